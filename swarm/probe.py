"""Finding out how a block uses attention by running it once, without weights, over a function that only looks.

This takes the place of a table of families: the shapes of the caches are what the block hands over, and a block
that can't run over our attention function is refused before any weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.errors import ModelError
from swarm.families import Family
from swarm.families.mixers import Mixer, MixerStates, has_mixers

PROBE = "swarm_probe"

# What the attention function is promised to understand, and keywords that say nothing about the result here.
_UNDERSTOOD = {"scaling", "alibi", "sliding_window", "softcap", "s_aux", "attention_chunk"}
_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "position_embeddings", "cache_position"}


_STATES_ONLY = {"linear_attention", "mamba"}  # types of layers that have no attention


@dataclass(frozen=True)
class KVGeometry:
    """The KV cache of one block: ``[kv_heads, tokens, key_dim]`` and ``[kv_heads, tokens, value_dim]``."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class BlockCache:
    """What one block keeps: keys and values of each token (or None), and ``state_bytes`` for each row."""

    kv: KVGeometry | None
    state_bytes: int


class _Enough(Exception):
    """All has been seen; the block needs not run further."""


class _Observer:
    """Stands where the engine's batch would be, and sees what the block keeps there."""

    def __init__(self, mixers: bool) -> None:
        self.kv: KVGeometry | None = None
        self.unknown: list[str] = []
        self.state_bytes = 0
        self.waits_for_states = mixers

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        states = MixerStates()
        output = mixer(hidden, states)
        kept = [*states.conv.values(), *states.recurrent.values()]
        self.state_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self.waits_for_states = False
        return output


def _look(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, *, batch: _Observer, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    batch.kv = KVGeometry(key.shape[1], key.shape[3], value.shape[3])
    batch.unknown = [
        name
        for name, given in kwargs.items()
        if given is not None and name not in _UNDERSTOOD and name not in _HARMLESS
    ]
    if not batch.waits_for_states:
        raise _Enough
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(PROBE, _look)


def unserved(model_type: str, why: str) -> ModelError:
    """The error for a model that nodes can't serve."""
    return ModelError(
        f"models of type {model_type!r} can't be served yet: {why}. "
        "docs/models.md lists those that can, docs/adding-a-model.md says how one is added"
    )


def probe_block(
    family: Family,
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    embeddings: Any,
    *,
    kind: str,
    model_type: str,
) -> BlockCache:
    """What a block on the meta device keeps; its config names :data:`PROBE` as its attention. ``kind`` is its type of
    layer, ``model_type`` for the error's text.

    Raises:
        ModelError: the block can't run over our attention function.
    """
    seen, name = _Observer(has_mixers(block)), type(block).__name__
    why = f"the attention of {name} does not go through transformers' interface"
    try:
        family.run(block, hidden, positions, embeddings, batch=seen)
    except _Enough:
        pass
    except Exception as error:  # whatever an unsuited block makes of these arguments
        why = f"{name} needs to be called in another way ({type(error).__name__}: {error})"
    if seen.unknown:
        raise unserved(model_type, f"the attention of {name} needs {', '.join(seen.unknown)}")
    # What fails once all has been seen is what can't run without weights: which experts a token goes to, for one.
    if seen.kv is None and not (kind in _STATES_ONLY and seen.state_bytes):
        raise unserved(model_type, why)
    return BlockCache(seen.kv, seen.state_bytes)
