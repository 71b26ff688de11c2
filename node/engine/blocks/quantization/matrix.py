"""A weight matrix in few bits, and multiplying with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CHUNK = 1 << 18  # weights that are quantized in one go


class QuantizedMatrix(nn.Module):
    """``[out, in]`` weights of a linear layer. Subclasses hold them in buffers and say how to compute with them.

    ``dequantize`` is the truth: ``multiply`` computes ``x @ dequantize().T`` up to the rounding of the dtype, whatever
    the number of rows.
    """

    many_rows: int | None = None
    """From this many rows on it is faster to dequantize the matrix and multiply with that."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, in]`` with n > 0 to ``[n, out]``, in the dtype of ``x``."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights ``[out, in]``."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Memory that it takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[…, in]`` to ``[…, out]``; differentiable with respect to it."""
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            output: torch.Tensor = _Differentiable.apply(rows, self)
        else:
            output = _multiply(self, rows)
        return output.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        context.matrix = matrix
        return _multiply(matrix, x)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ context.matrix.dequantize(grad.dtype), None


def _multiply(matrix: QuantizedMatrix, rows: torch.Tensor) -> torch.Tensor:
    if not len(rows):
        return rows.new_empty(0, matrix.out_features)
    if matrix.many_rows is not None and len(rows) >= matrix.many_rows:
        return nn.functional.linear(rows, matrix.dequantize(rows.dtype))
    return matrix.multiply(rows)


def chunks(weight: torch.Tensor, *, rows: int) -> Iterator[torch.Tensor]:
    """``weight`` ``[out, in]`` in pieces of a multiple of ``rows`` rows, so that what quantizing one needs for a moment
    stays small beside a block."""
    size = max(1, _CHUNK // weight.shape[1] // rows) * rows
    return iter(weight.split(size))
