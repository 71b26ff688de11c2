"""A trial of a kind of matrix on this machine, before weights are trusted to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .matrices.matrix import QuantizedMatrix

FAILURES = (RuntimeError, AttributeError, NotImplementedError, TypeError, AssertionError)
"""What a kernel raises that there isn't here, or that doesn't take what it is given."""


@torch.inference_mode()
def is_right(
    make: Callable[[], QuantizedMatrix],
    meant: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    weights: float,
    products: float,
) -> bool:
    """Whether what ``make`` makes has the weights ``meant`` (``[out, in]``, on any device), up to the relative error
    (of the norm) ``weights``; and products of rows in ``dtype`` are those of its weights, up to ``products``."""
    matrix = make()
    restored = matrix.dequantize(torch.float32)
    right = _error(restored, meant) < weights
    for rows in (1, 5):
        x = torch.randn(rows, meant.shape[1], generator=generator).to(restored.device, dtype)
        right = right and _error(matrix.multiply(x), x.float() @ restored.T) < products
    return right


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float().to(found.device)
    return ((found.float() - expected).norm() / expected.norm()).item()
