"""Finding out how a block uses attention by running it once, without weights, over a function that only looks.

This takes the place of a table of families: the shapes of the KV cache are what the block hands over, and a block
that can't run over our attention function is refused before any weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.errors import ModelError
from swarm.families import Family

PROBE = "swarm_probe"

# What the attention function is promised to understand, and keywords that say nothing about the result here.
_UNDERSTOOD = {"scaling", "batch", "alibi", "sliding_window", "softcap", "s_aux", "attention_chunk"}
_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "position_embeddings", "cache_position"}


@dataclass(frozen=True)
class KVGeometry:
    """The KV cache of one block: ``[kv_heads, tokens, key_dim]`` and ``[kv_heads, tokens, value_dim]``."""

    kv_heads: int
    key_dim: int
    value_dim: int


class _Seen(Exception):
    """Carries what the probe saw out of the block, which needs not run further."""

    def __init__(self, geometry: KVGeometry, unknown: list[str]) -> None:
        self.geometry = geometry
        self.unknown = unknown


def _look(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> NoReturn:
    unknown = [
        name
        for name, given in kwargs.items()
        if given is not None and name not in _UNDERSTOOD and name not in _HARMLESS
    ]
    raise _Seen(KVGeometry(key.shape[1], key.shape[3], value.shape[3]), unknown)


ALL_ATTENTION_FUNCTIONS.register(PROBE, _look)


def probe_block(
    family: Family, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any
) -> KVGeometry:
    """The KV geometry of a block on the meta device, whose config names :data:`PROBE` as its attention.

    Raises:
        ModelError: the block can't run over our attention function.
    """
    try:
        family.run(block, hidden, positions, embeddings, batch=None)
    except _Seen as seen:
        if seen.unknown:
            raise ModelError(
                f"blocks of class {type(block).__name__} can't be served yet: "
                f"their attention needs {', '.join(seen.unknown)}"
            ) from None
        return seen.geometry
    except Exception as error:  # whatever an unsuited block makes of these arguments
        raise ModelError(
            f"blocks of class {type(block).__name__} can't be served yet: {type(error).__name__} {error}"
        ) from error
    raise ModelError(f"blocks of class {type(block).__name__} can't be served yet: they bring their own attention")
