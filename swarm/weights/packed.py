"""Weights of a block that a quantized checkpoint holds as they could be computed with, without being dequantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .checkpoint import Checkpoint
from .dequantize import Format, Headers, Parts
from .filling import WeightPlan


@dataclass(frozen=True)
class PackedRows:
    """A matrix ``[out, in]``, or some of its rows.

    Attributes:
        key: the checkpoint's name of it, as of an ordinary tensor.
        index: which of the experts that ``key`` holds; ``None``: it holds one matrix.
        experts: how many it holds.
        format, headers: how, and the parts.
    """

    key: str
    index: int | None
    experts: int
    format: Format
    headers: Headers

    @property
    def stored_bytes(self) -> int:
        """What its parts take."""
        return sum(header.bytes for header in self.headers.values()) // self.experts


@dataclass(frozen=True)
class PackedWeight:
    """A parameter: its matrix, or those of all experts; of each the pieces that lie below one another."""

    matrices: tuple[tuple[PackedRows, ...], ...]


class Keeper(Protocol):
    """Who decides what of a block stays packed, and puts it there."""

    def choose(self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device) -> Collection[str]:
        """Which of the parameters of ``block``, whose weights are on the meta device, are not to be dequantized."""

    def fill(
        self,
        block: nn.Module,
        packed: Mapping[str, PackedWeight],
        device: torch.device,
        read: Callable[[PackedRows], Parts],
    ) -> None:
        """Puts the chosen ones into ``block``, where everything else is loaded. ``read`` gives parts on the CPU.

        Raises:
            ValueError: parts don't fit together.
        """


def packed_weights(plan: WeightPlan, checkpoint: Checkpoint, prefix: str) -> dict[str, PackedWeight]:
    """The parameters that begin with ``prefix`` and that ``checkpoint`` holds quantized, by what comes behind it.

    Those that the model's rules make of others, except by stacking, aren't there: they need the weights themselves.
    """
    found: dict[str, PackedWeight] = {}
    for name, keys in plan.sources.items():
        if not name.startswith(prefix):
            continue
        columns = plan.stacks.get(name)
        if columns is None:
            if len(keys) > 1 or name in plan.converted or (packed := checkpoint.packed(keys[0])) is None:
                continue
            headers = checkpoint.headers(keys[0])
            experts = headers[packed.format.main].shape[0] if packed.format.stacked else 1
            rows = [PackedRows(keys[0], index, experts, packed.format, headers) for index in range(experts)]
            if not packed.format.stacked:
                rows = [PackedRows(keys[0], None, 1, packed.format, headers)]
            found[name.removeprefix(prefix)] = PackedWeight(tuple((each,) for each in rows))
        elif len({len(column) for column in columns}) == 1 and (whole := _stack(columns, checkpoint)):
            found[name.removeprefix(prefix)] = whole
    return found


def _stack(columns: Iterable[tuple[str, ...]], checkpoint: Checkpoint) -> PackedWeight | None:
    experts: list[tuple[PackedRows, ...]] = []
    for keys in zip(*columns, strict=True):
        rows = []
        for key in keys:
            packed = checkpoint.packed(key)
            if packed is None or packed.format.stacked:
                return None
            rows.append(PackedRows(key, None, 1, packed.format, checkpoint.headers(key)))
        experts.append(tuple(rows))
    return PackedWeight(tuple(experts))


class PartReader:
    """Reads parts, those that hold all experts once for all of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._last: tuple[str, Parts] | None = None

    def __call__(self, rows: PackedRows) -> Parts:
        if rows.index is None:
            return self._checkpoint.read_parts(rows.key)
        if self._last is None or self._last[0] != rows.key:
            self._last = rows.key, self._checkpoint.read_parts(rows.key)
        at = slice(rows.index, rows.index + 1)
        return {suffix: part[at] for suffix, part in self._last[1].items()}
