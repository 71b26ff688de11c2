"""Making a block that was just loaded ready to compute."""

from __future__ import annotations

from torch import nn

from .joined_linear import join_linears
from .lean_block import lighten_block
from .packing import pack_block
from .quantization import Scheme, quantize_block


def finish_block(block: nn.Module, scheme: Scheme | None = None, *, deterministic: bool = False) -> None:
    """Quantizes ``block`` if there is a scheme; packs the linear layers that are left; and, unless it is to be made
    deterministic, has as few operations as can be."""
    if scheme is not None:
        quantize_block(block, scheme)
    if not deterministic:
        join_linears(block)
    pack_block(block)
    if not deterministic:
        lighten_block(block)
