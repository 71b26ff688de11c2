"""How a quantized checkpoint stores a weight: as several tensors, from which it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from .numbers import Codes, Integers, Layout

Parts = Mapping[str, torch.Tensor]
"""What a weight is computed from, by suffix of the name in the checkpoint."""


@dataclass(frozen=True)
class Header:
    """What is known of a part without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


Headers = Mapping[str, Header]


def _no_layout(headers: Headers, out: int, inputs: int) -> None:
    return None


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        main: the suffix of the name of the tensor that holds the numbers. What comes before it is the stem.
        needed: suffixes of the others without which the tensor is an ordinary one.
        optional: and of those that may be there.
        weight: the suffix of the model's name for it.
        unpack: computes it from the parts, as floating point numbers. Raises ValueError if the parts don't fit.
        layout: what a weight ``[out, in]`` of such parts is made of, if that is integers or codes.
        read: these, from the parts. What ``unpack`` gives is their ``weight()``.
        rows: by suffix, the dimension of a part that goes along the weight's rows, so that some of these can be
            computed by themselves; without any, a weight is always computed whole.
        row_block: how many rows share a place along that dimension, if that isn't a divisor of all.
        stacked: the weights of all experts are one tensor, ``[experts, in, out]``, and so are the parts.
    """

    main: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    weight: str
    unpack: Callable[[Parts], torch.Tensor]
    layout: Callable[[Headers, int, int], Layout | None] = _no_layout
    read: Callable[[Parts], Integers | Codes] | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    row_block: int | None = None
    stacked: bool = False


@dataclass(frozen=True)
class PackedTensor:
    """A weight that is to be computed. ``parts``: the checkpoint's names by suffix."""

    parts: Mapping[str, str]
    format: Format


def find_packed(names: Collection[str], formats: Collection[Format]) -> dict[str, PackedTensor]:
    """The weights that a checkpoint with tensors ``names`` holds in one of the ``formats``, by the model's name.

    Where several formats fit, it is the first.
    """
    known, found = set(names), dict[str, PackedTensor]()
    for form in formats:
        for name in names:
            stem = name.removesuffix(form.main)
            if not name.endswith(form.main) or any(stem + suffix not in known for suffix in form.needed):
                continue
            suffixes = (form.main, *form.needed, *(each for each in form.optional if stem + each in known))
            found.setdefault(stem + form.weight, PackedTensor({each: stem + each for each in suffixes}, form))
    return found
