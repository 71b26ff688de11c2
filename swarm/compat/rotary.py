"""Position embeddings as the families' rotary modules make them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

_BY_LENGTH = ("dynamic", "longrope")
"""Ways of scaling whose frequencies depend on how long the sequence is."""


def rotary_of(base: nn.Module) -> nn.Module | None:
    """The rotary module beside a model's list of blocks, or None: it has none."""
    return getattr(base, "rotary_emb", None)


def varies_with_length(rotary: nn.Module | None) -> bool:
    """Whether frequencies depend on the longest sequence in a batch, which some ways of scaling do."""
    kinds = getattr(rotary, "rope_type", "default")
    every = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any("dynamic" in kind or kind == "longrope" for kind in every)


def positions_end(rotary: nn.Module | None) -> int | None:
    """The first position that the module has no embedding for, if it takes them from a table; else None."""
    table = getattr(rotary, "embed_positions", None)
    return len(table) if isinstance(table, torch.Tensor) else None


def embed_positions(rotary: Any, hidden: torch.Tensor, positions: torch.Tensor, layer_types: set[str]) -> Any:
    """Position embeddings of ``positions`` ``[1, N]`` for ``hidden`` ``[1, N, H]``, as blocks take them; a dict by
    layer type if the module has frequencies of its own for each of ``layer_types``."""
    if _by_layer_type(type(rotary).forward):
        return {kind: rotary(hidden, positions, kind) for kind in sorted(layer_types)}
    if getattr(rotary, "rope_type", None) in _BY_LENGTH:
        return _by_row(rotary, hidden, positions)
    if hasattr(rotary, "mrope_section"):
        # Models that see images place tokens in time, height and width, which for text are all the same.
        positions = positions[None].expand(3, -1, -1)
    return rotary(hidden, positions)


@functools.cache
def _by_layer_type(forward: Any) -> bool:
    return "layer_type" in inspect.signature(forward).parameters


def _by_row(rotary: Any, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotary embeddings whose frequencies hang on the length of the sequence, so far as its tokens are in the batch."""
    starts = (positions[0].diff() != 1).nonzero().flatten() + 1
    parts = []
    for row in positions.tensor_split(starts.cpu(), dim=1):
        # nothing of the sequence before
        rotary.inv_freq.copy_(rotary.original_inv_freq)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        parts.append(rotary(hidden, row))
    return tuple(torch.cat(several, dim=1) for several in zip(*parts, strict=True))
