"""What weights of some formats are made of, before it is multiplied out: integers, or codes, and their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .packing import by_blocks


@dataclass(frozen=True)
class Layout:
    """What is known of such a weight before it is read.

    Attributes:
        kind: bits and meaning of a number. int8 has one scale a row and no zeros.
        group: how many inputs share a scale.
        short: bfloat16 holds the scales exactly, and there are no zeros.
        ordered: the inputs of a group need not lie side by side.
    """

    kind: Literal["int4", "int8", "nf4", "fp4"]
    group: int
    short: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class Integers:
    """A weight ``(numbers - zeros) * scales``.

    Attributes:
        numbers: uint8 or int8 ``[out, in]``.
        zeros: ``[out, groups]``, of any dtype; ``None``: 0.
        scales: float ``[out, groups]``, or ``[1, 1]``.
        columns: int64 ``[in]``, the group of each input; ``None``: groups lie side by side.
    """

    numbers: torch.Tensor
    zeros: torch.Tensor | None
    scales: torch.Tensor
    columns: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """float32 ``[out, in]``. Raises ValueError if the parts don't fit."""
        weight = self.numbers.float()
        if self.zeros is not None:
            by_blocks(torch.Tensor.sub_, weight, self.zeros.float(), columns=self.columns)
        return by_blocks(torch.Tensor.mul_, weight, self.scales.float(), columns=self.columns)


@dataclass(frozen=True)
class Codes:
    """A weight ``code[numbers] * scales``.

    Attributes:
        numbers: uint8 ``[out, in / 2]``, the first of two in the high bits.
        scales: float32 ``[out, in / group]``.
        code: float32 ``[16]``.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    kind: Literal["nf4", "fp4"]
