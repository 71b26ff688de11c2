"""What stands where transformers' code expects a cache: at a client, in a block, in a mixer.

A *mixer* is a layer that keeps more than keys and values: a convolution's last inputs, a recurrent state (Mamba, gated
DeltaNet).
"""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .keywords import cache_keyword


class HollowCache(Cache):
    """A cache without layers: keys and values are elsewhere, and so are masks and position biases, which are kept as
    small as if nothing came before."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns done."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """Asked of all layers; of none, the answer would be that they all keep states instead of columns."""
        return [False]

    def __bool__(self) -> bool:
        return True  # len() counts layers, of which there are none


class PassingCache:
    """Stands where a block expects a cache, and carries the engine's ``batch`` to its mixers. Attention finds nothing
    in it: its keys and values are the attention function's business."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


class PositionCache(PassingCache):
    """As :class:`PassingCache`, for blocks that count positions on from the cache's length.

    That is a number for one row; as a tensor ``[N]`` it makes the count come out right for tokens of many rows.
    ``positions``: ``[1, N]``.
    """

    def __init__(self, batch: Any, positions: torch.Tensor) -> None:
        super().__init__(batch)
        self._offsets = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self._offsets


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

    @property
    def layers(self) -> _AsLayers:
        """Older versions of mixers look at the states themselves, as those of a layer."""
        return _AsLayers(self)

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


class _AsLayers:
    """A mixer's states as the list of layers of a cache, each of them."""

    record_past = False

    def __init__(self, states: MixerStates) -> None:
        self.conv_states, self.recurrent_states = states.conv, states.recurrent

    def __getitem__(self, layer_idx: int) -> _AsLayers:
        return self


def is_mixer(kind: type[nn.Module]) -> bool:
    """Whether modules of this class ask their cache for states. Their code is looked at for the names of what they
    call, since the keyword for the cache is the same as that of attention."""
    if cache_keyword(kind) is None:
        return False
    functions = [method for base in kind.__mro__ for method in vars(base).values() if callable(method)]
    return any("update_conv_state" in names or "update_recurrent_state" in names for names in map(_names, functions))


def _names(function: Any) -> set[str]:
    """The attributes and globals that a function's code names, also if decorators wrap it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = function.__code__ if isinstance(function, FunctionType) else None
    return set() if not isinstance(code, CodeType) else set(code.co_names)
