"""Layers that keep more than keys and values: a convolution's last inputs, a recurrent state (Mamba, gated DeltaNet).

transformers' modules for these (here: *mixers*) take a cache as ``cache_params`` and run over whole rows, so they can't
be given tokens of many rows packed flat. Here each is made to hand its tokens to the engine's batch, which gives them
back row by row, with each row's states.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import nn


class MixerStates:
    """The states of one mixer for some rows, in the form that transformers' modules ask a cache for.

    Attributes:
        conv: by index (most mixers have one convolution), the last inputs ``[rows, channels, kernel]``.
        recurrent: by index, ``[rows, …]``.
    """

    def __init__(
        self, conv: dict[int, torch.Tensor] | None = None, recurrent: dict[int, torch.Tensor] | None = None
    ) -> None:
        self.conv, self.recurrent = conv or {}, recurrent or {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.recurrent.get(state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.conv or self.recurrent)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """``states`` ``[rows, channels, T]`` are new inputs; returned with those before them, or zeros."""
        before = self.conv.get(state_idx)
        kernel = before.shape[-1] if before is not None else conv_kernel_size or states.shape[-1]
        if before is None:
            states = nn.functional.pad(states, (max(0, kernel - states.shape[-1]), 0))
        else:
            states = torch.cat([before, states], dim=-1)
        self.conv[state_idx] = states[..., -kernel:]
        return states

    def update_recurrent_state(
        self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.recurrent[state_idx] = states
        return states


class Mixer(Protocol):
    """A mixer's own forward: ``[rows, T, H]`` in and out; without states nothing is before and nothing is kept."""

    def __call__(self, hidden: torch.Tensor, states: MixerStates | None) -> torch.Tensor: ...


class BatchCache:
    """Stands where blocks with mixers expect a cache, and carries the batch to them. Attention finds nothing in it: its
    keys and values are the attention function's business."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


class _ByRows(nn.Module):
    """Mixed into a mixer's class: its tokens go through ``batch.mix``."""

    layer_idx: int

    def forward(
        self, hidden_states: torch.Tensor, cache_params: BatchCache, attention_mask: Any = None, **_: Any
    ) -> torch.Tensor:
        """``hidden_states`` ``[1, N, H]`` in and out."""

        def mixer(hidden: torch.Tensor, states: MixerStates | None) -> torch.Tensor:
            return super(_ByRows, self).forward(hidden, cache_params=states)

        return cache_params.batch.mix(self.layer_idx, hidden_states, mixer)


def adapt_mixers(block: nn.Module) -> None:
    """Makes the mixers in ``block``, if there are any, run row by row."""
    found = [module for module in block.modules() if "cache_params" in inspect.signature(module.forward).parameters]
    for module in found:
        kind = type(module)
        module.__class__ = type(f"{kind.__name__}ByRows", (_ByRows, kind), {})
    block.has_mixers = bool(found)  # type: ignore[assignment]


def in_mixer(block: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``block``, to which :func:`adapt_mixers` was applied, is in a mixer."""
    parts = name.split(".")
    return any(isinstance(block.get_submodule(".".join(parts[:end])), _ByRows) for end in range(1, len(parts)))


def has_mixers(block: nn.Module) -> bool:
    """Whether :func:`adapt_mixers` found any."""
    return bool(getattr(block, "has_mixers", False))
