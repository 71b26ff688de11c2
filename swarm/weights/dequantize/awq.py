"""AWQ as AutoAWQ's "gemm" version stores it: 4 bits, a scale and a zero a group of inputs.

Source of the format: AutoAWQ's ``WQLinear_GEMM``. ``qweight`` ``[in, out / 8]`` and ``qzeros`` ``[groups, out / 8]``
are packed along the outputs, eight of which are in the order of :data:`_ORDER` in a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .format import Format, Headers, Parts
from .numbers import Integers, Layout
from .packing import unpack_words

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def formats(config: Mapping[str, Any]) -> list[Format]:
    bits, version = int(config.get("bits") or config.get("w_bit") or 4), str(config.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise ValueError(f"{bits} bits in version {version!r}")
    needed = (".qzeros", ".scales")
    return [Format(".qweight", needed, (), ".weight", lambda parts: _read(parts).weight(), _layout, _read)]


def _read(parts: Parts) -> Integers:
    numbers, zeros = (_ordered(unpack_words(parts[name], 4)) for name in (".qweight", ".qzeros"))  # [in or groups, out]
    if zeros.shape != parts[".scales"].shape:
        raise ValueError(f"zeros {list(zeros.shape)} don't fit scales {list(parts['.scales'].shape)}")
    return Integers(numbers.T.contiguous(), zeros.T, parts[".scales"].T)


def _layout(headers: Headers, out: int, inputs: int) -> Layout | None:
    return Layout("int4", inputs * out // headers[".scales"].numel)


def _ordered(numbers: torch.Tensor) -> torch.Tensor:
    back = torch.argsort(torch.tensor(_ORDER))
    return numbers.unflatten(-1, (-1, 8))[..., back].flatten(-2)
