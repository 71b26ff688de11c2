"""Layers that keep more than keys and values: a convolution's last inputs, a recurrent state (Mamba, gated DeltaNet).

transformers' modules for these (here: *mixers*) take a cache and run over whole rows, so they can't be given tokens of
many rows packed flat. Here each is made to hand its tokens to the engine's batch, which gives them back row by row,
with each row's states.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ...compat.caches import MixerStates, PassingCache, is_mixer
from ...compat.keywords import cache_keyword, given_cache, with_cache


class Mixer(Protocol):
    """A mixer's own forward: ``[rows, T, H]`` in and out; without states nothing is before and nothing is kept."""

    def __call__(self, hidden: torch.Tensor, states: MixerStates | None) -> torch.Tensor: ...


class _ByRows(nn.Module):
    """Mixed into a mixer's class: its tokens go through ``batch.mix``."""

    layer_idx: int

    _cache_keyword: str

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **given: Any) -> torch.Tensor:
        """``hidden_states`` ``[1, N, H]`` in and out. Among those ``given`` is a :class:`PassingCache`."""

        def mixer(hidden: torch.Tensor, states: MixerStates | None) -> torch.Tensor:
            return super(_ByRows, self).forward(hidden, **with_cache({}, states, self._cache_keyword))

        cache: PassingCache = given_cache(given)
        return cache.batch.mix(self.layer_idx, hidden_states, mixer)


def adapt_mixers(block: nn.Module) -> None:
    """Makes the mixers in ``block``, if there are any, run row by row."""
    found = [module for module in block.modules() if is_mixer(type(module))]
    for module in found:
        kind = type(module)
        options = {"_cache_keyword": cache_keyword(kind)}
        # in place: everything but the forward stays, parameters and their names too
        module.__class__ = type(f"{kind.__name__}ByRows", (_ByRows, kind), options)
    block.has_mixers = bool(found)  # type: ignore[assignment]


def in_mixer(block: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``block``, to which :func:`adapt_mixers` was applied, is in a mixer."""
    parts = name.split(".")
    return any(isinstance(block.get_submodule(".".join(parts[:end])), _ByRows) for end in range(1, len(parts)))


def has_mixers(block: nn.Module) -> bool:
    """Whether :func:`adapt_mixers` found any."""
    return bool(getattr(block, "has_mixers", False))
