"""Modules and functions of single families that ours are made from."""

from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconLinear
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb as apply_falcon_rotary
from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector
from transformers.models.gptj.modeling_gptj import GPTJAttention

__all__ = [
    "BloomAttention",
    "FalconAttention",
    "FalconLinear",
    "GPTJAttention",
    "apply_falcon_rotary",
    "compute_mup_vector",
]
