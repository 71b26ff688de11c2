"""Matrices as a quantized checkpoint has them, for which there is no kernel: they are dequantized when used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swarm.weights.dequantize import Format, Parts

from .matrix import QuantizedMatrix

_PIECE = 1 << 19  # weights that are dequantized at a time: what they need for it stays in a processor's cache


class StoredMatrix(QuantizedMatrix):
    """The checkpoint's own parts, and its format's way to compute some rows of the weights from them.

    Args:
        shape: ``(out, in)``, of which only the parts know by themselves.
    """

    def __init__(self, parts: Parts, form: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(*shape)
        self.form, self.dtype = form, dtype
        self._suffixes = list(parts)
        for index, part in enumerate(parts.values()):
            self.register_buffer(f"part{index}", part)
        self._step = self._rows_at_a_time()
        found = self._rows(0, self._step).shape
        if found != (min(self._step, shape[0]), shape[1]):
            raise ValueError(f"rows of {list(found)} don't fit a weight {list(shape)}")

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty(len(x), self.out_features)
        for start in range(0, self.out_features, self._step):
            rows = self._rows(start, start + self._step).to(x.dtype)
            output[:, start : start + len(rows)] = nn.functional.linear(x, rows)
        return output

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        starts = range(0, self.out_features, self._step)
        return torch.cat([self._rows(start, start + self._step).to(dtype) for start in starts])

    def _rows_at_a_time(self) -> int:
        """A multiple of the rows that share a scale."""
        block = self.form.row_block or 1
        for suffix, part in zip(self._suffixes, self.buffers(), strict=True):
            if (dim := self.form.rows.get(suffix)) is not None and part.dim() > dim and self.form.row_block is None:
                block = max(block, self.out_features // max(1, part.shape[dim]) if part.shape[dim] > 1 else 1)
        return max(1, _PIECE // self.in_features // block) * block

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """float32 or bfloat16 ``[stop - start, in]``, less at the end."""
        stop = min(stop, self.out_features)
        parts: dict[str, torch.Tensor] = {}
        for suffix, part in zip(self._suffixes, self.buffers(), strict=True):
            dim = self.form.rows.get(suffix)
            count = 1 if dim is None or part.dim() <= dim else part.shape[dim]
            if dim is not None and count > 1:
                each = 1 if count == self.out_features else self.form.row_block or self.out_features // count
                part = part.narrow(dim, start // each, -(-stop // each) - start // each)
            parts[suffix] = part
        rows = self.form.unpack(parts)
        return rows[0].T if self.form.stacked else rows


class JoinedMatrix(QuantizedMatrix):
    """Matrices whose rows lie below one another, such as an expert's gate and up."""

    def __init__(self, parts: Sequence[QuantizedMatrix]) -> None:
        super().__init__(sum(part.out_features for part in parts), parts[0].in_features)
        self.parts: Sequence[QuantizedMatrix] = nn.ModuleList(parts)  # type: ignore[assignment]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([part.dequantize(dtype) for part in self.parts])
