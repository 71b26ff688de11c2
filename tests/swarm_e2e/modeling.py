"""Importing this imports the modeling code of the families under test, which transformers otherwise does lazily."""

from transformers.models.bloom import modeling_bloom
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.falcon import modeling_falcon
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_next import modeling_qwen3_next

__all__ = [
    "modeling_bloom",
    "modeling_deepseek_v3",
    "modeling_falcon",
    "modeling_gemma3",
    "modeling_gpt_oss",
    "modeling_llama",
    "modeling_llama4",
    "modeling_mixtral",
    "modeling_qwen3_next",
]
