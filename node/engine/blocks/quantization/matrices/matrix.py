"""A weight matrix in few bits, and multiplying with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from swarm.compute.frozen_product import FrozenProduct

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
            output: torch.Tensor = FrozenProduct.apply(rows, self._compute, self.dequantize)
        else:
            output = self._compute(rows)
        return output.view(*x.shape[:-1], self.out_features)

    def _compute(self, rows: torch.Tensor) -> torch.Tensor:
        if not len(rows):
            return rows.new_empty(0, self.out_features)
        if self.many_rows is not None and len(rows) >= self.many_rows:
            return nn.functional.linear(rows, self.dequantize(rows.dtype))
        return self.multiply(rows)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def chunks(weight: torch.Tensor, *, rows: int) -> Iterator[torch.Tensor]:
    """``weight`` ``[out, in]`` in pieces of a multiple of ``rows`` rows, so that what quantizing one needs for a moment
    stays small beside a block."""
    size = max(1, _CHUNK // weight.shape[1] // rows) * rows
    return iter(weight.split(size))
