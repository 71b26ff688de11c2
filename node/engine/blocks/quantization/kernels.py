"""Which kernel multiplies with what a quantized checkpoint has, and whether it does so right on this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm.errors import UsageError
from swarm.weights.dequantize import Codes, Integers, Layout

from .matrices.bnb import bitsandbytes, has_cpu_kernel
from .matrices.int4 import CudaInt4Matrix, Int4Matrix, group_in
from .matrices.int8 import Int8Matrix
from .matrices.matrix import QuantizedMatrix
from .matrices.nf4 import CudaNF4Matrix, NF4Matrix
from .trial import FAILURES, is_right


@dataclass(frozen=True)
class Kernel:
    """One kind of packed matrix on one kind of device.

    Attributes:
        make: the matrix of what a format reads, on its device, for activations of a dtype.
        size: bytes of it at most, by layout, out, in and that dtype.
    """

    make: Callable[[Any, Layout, torch.dtype], QuantizedMatrix]
    size: Callable[[Layout, int, int, torch.dtype], int]


def _coded_size(scale_bytes: int) -> Callable[[Layout, int, int, torch.dtype], int]:
    return lambda layout, out, inputs, dtype: out * (inputs // 2 + inputs // layout.group * scale_bytes) + 64


_INT4 = {
    "cpu": Kernel(Int4Matrix.of, Int4Matrix.size_of),
    "cuda": Kernel(CudaInt4Matrix.of, CudaInt4Matrix.size_of),
}
_INT8 = {"cpu": Kernel(Int8Matrix.of, Int8Matrix.size_of)}
_CODES = {"cpu": Kernel(NF4Matrix.of, _coded_size(2)), "cuda": Kernel(CudaNF4Matrix.of, _coded_size(4))}


def find_kernel(layout: Layout, out: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The kernel for a weight ``[out, in]`` of ``layout``; ``None``: there is none here."""
    if layout.kind == "int4":
        fits = out % 16 == 0 and group_in(layout, inputs) is not None
        kernel = _INT4.get(device.type)
    elif layout.kind == "int8":
        fits = out % 8 == 0 and inputs % 32 == 0
        kernel = _INT8.get(device.type)
    else:
        fits = out % 32 == 0 and inputs % layout.group == 0
        kernel = _CODES.get(device.type)
    group = min(layout.group, 1024)  # a larger one is computed as one of these
    return kernel if kernel is not None and fits and _works(kernel, layout.kind, group, device, dtype) else None


@functools.cache
def _works(kernel: Kernel, kind: str, group: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are those of the weights that a small matrix stands for."""
    if kind in ("nf4", "fp4") and device.type == "cpu" and (dtype != torch.bfloat16 or not _has_codes()):
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = 256 if 256 % group == 0 else group
    found, meant = _example(kind, 96, inputs, group, generator)
    layout = Layout(kind, group)  # type: ignore[arg-type]

    def make() -> QuantizedMatrix:
        return kernel.make(to_device(found, device), layout, dtype)

    try:  # in the weights one rounding to bfloat16
        return is_right(make, meant, generator, dtype, weights=0.004, products=0.01)
    except (*FAILURES, UsageError):
        return False


def to_device(found: Integers | Codes, device: torch.device) -> Integers | Codes:
    """The same on ``device``."""
    parts: dict[str, Any] = {
        name: part.to(device) for name, part in vars(found).items() if isinstance(part, torch.Tensor)
    }
    return replace(found, **parts)


def _has_codes() -> bool:
    try:
        return has_cpu_kernel()
    except UsageError:  # there is no such package here
        return False


def _example(
    kind: str, out: int, inputs: int, group: int, generator: torch.Generator
) -> tuple[Integers | Codes, torch.Tensor]:
    """Something to read, and the weights ``[out, in]`` that it stands for."""
    if kind == "int8":
        numbers = torch.randint(-128, 128, (out, inputs), dtype=torch.int8, generator=generator)
        whole = Integers(numbers, None, torch.rand(out, 1, generator=generator) + 0.1)
        return whole, whole.weight()
    groups = inputs // group
    scales = torch.rand(out, groups, generator=generator) + 0.1
    if kind == "int4":
        numbers = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, generator=generator)
        zeros = torch.randint(0, 17, (out, groups), generator=generator)
        whole = Integers(numbers, zeros, scales.half(), None)
        return whole, whole.weight()
    pairs = torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8, generator=generator)
    code = bitsandbytes().functional.get_4bit_type(kind, device="cpu")
    numbers = torch.stack((pairs >> 4, pairs & 15), -1).flatten(1)
    return Codes(pairs, scales, code, kind), code[numbers.int()] * scales.repeat_interleave(group, 1)  # type: ignore[arg-type]
