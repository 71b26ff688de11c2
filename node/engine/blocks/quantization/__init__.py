"""Blocks with quantized weights: 8 or 4 bits each, computed with as they are, on a CPU or a CUDA device.

Activations, the KV cache, norms and routers stay in the span's dtype. ``schemes.py`` says what there is,
``blocks.py`` puts it into a block.
"""

from .blocks import quantize_block, quantized_bytes
from .keep import Keep, Use, describe
from .schemes import SCHEMES, Scheme, find_scheme, schemes_on

__all__ = [
    "SCHEMES",
    "Keep",
    "Scheme",
    "Use",
    "describe",
    "find_scheme",
    "quantize_block",
    "quantized_bytes",
    "schemes_on",
]
