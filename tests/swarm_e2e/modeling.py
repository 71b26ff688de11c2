"""Importing this imports the modeling code of the families under test, which transformers otherwise does lazily."""

from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

__all__ = ["modeling_bloom", "modeling_falcon", "modeling_llama", "modeling_mixtral"]
