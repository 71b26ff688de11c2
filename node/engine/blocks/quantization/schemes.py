"""The kinds of quantization, and which of them this machine computes right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from swarm.errors import UsageError

from .matrices.int4 import CudaInt4Matrix, Int4Matrix, group_of
from .matrices.int8 import CudaInt8Matrix, Int8Matrix
from .matrices.matrix import QuantizedMatrix
from .matrices.nf4 import GROUP, CudaNF4Matrix, NF4Matrix
from .trial import FAILURES, is_right


@dataclass(frozen=True)
class Scheme:
    """One kind of quantization on one kind of device.

    Attributes:
        name: as on the command line and in the DHT.
        make: a matrix of weights ``[out, in]``, on their device.
        size: bytes of it, by out, in and the dtype of the weights.
        fits: whether weights of ``(out, in)`` can be quantized; others stay as they are.
        error: the largest relative error (of the norm) that normally distributed weights have.
    """

    name: str
    make: Callable[[torch.Tensor], QuantizedMatrix]
    size: Callable[[int, int, torch.dtype], int]
    fits: Callable[[int, int], bool]
    error: float


def _divides(rows: int, columns: int) -> Callable[[int, int], bool]:
    return lambda out, size: out % rows == 0 and size % columns == 0


def _fits_int4(out: int, size: int) -> bool:
    return out % 16 == 0 and group_of(size) is not None


_CPU = (
    Scheme("int8", Int8Matrix.quantize, Int8Matrix.size, _divides(8, 32), 0.02),
    Scheme("nf4", NF4Matrix.quantize, NF4Matrix.size, _divides(32, GROUP), 0.12),
    Scheme("int4", Int4Matrix.quantize, Int4Matrix.size, _fits_int4, 0.15),
)
_CUDA = (
    Scheme("int8", CudaInt8Matrix.quantize, CudaInt8Matrix.size, _divides(8, 32), 0.02),
    Scheme("nf4", CudaNF4Matrix.quantize, CudaNF4Matrix.size, _divides(32, GROUP), 0.12),
    Scheme("int4", CudaInt4Matrix.quantize, CudaInt4Matrix.size, _fits_int4, 0.15),
)
SCHEMES = tuple(scheme.name for scheme in _CPU)


def schemes_on(device: torch.device) -> tuple[Scheme, ...]:
    """The schemes for this kind of device; whether they work on this one is not looked at."""
    return {"cpu": _CPU, "cuda": _CUDA}.get(device.type, ())


def find_scheme(name: str, device: torch.device, dtype: torch.dtype) -> Scheme:
    """The scheme called ``name`` for weights of ``dtype`` on ``device``.

    Raises:
        UsageError: there is none of that name, a package is missing, or this machine doesn't compute it right.
    """
    if name not in SCHEMES:
        raise UsageError(f"--quantization {name!r} is not one of checkpoint, packed, none, auto, {', '.join(SCHEMES)}")
    kinds = schemes_on(device)
    if not kinds:
        raise UsageError(f"--quantization {name} works on cpu and cuda, not on {device.type}: leave it out")
    scheme = next(scheme for scheme in kinds if scheme.name == name)
    _check(scheme, device, dtype)
    return scheme


@functools.cache
def _check(scheme: Scheme, device: torch.device, dtype: torch.dtype) -> None:
    """Compares products with those of the dequantized matrix, and that with the weights it was made of."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator).to(device, dtype)
    try:  # products of int8 with int8 round the activations too
        right = is_right(lambda: scheme.make(weight), weight, generator, dtype, weights=scheme.error, products=0.02)
    except FAILURES as error:
        raise UsageError(_unusable(scheme, device, f" ({error})")) from error
    if not right:
        raise UsageError(_unusable(scheme, device, " (wrong results)"))


def _unusable(scheme: Scheme, device: torch.device, why: str) -> str:
    others = ", ".join(name for name in ("none", *SCHEMES) if name != scheme.name)
    return (
        f"--quantization {scheme.name} can't be computed by torch {torch.__version__} on this machine's {device.type}"
        f"{why}: take one of {others}"
    )
