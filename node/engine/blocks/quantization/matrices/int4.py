"""Four bits a weight in even steps, with a scale and an offset for each group of a row, in torch's own operators.

The value of step q (0 to 15) is ``(q - 8) * scale + offset``. Weights that are quantized here have groups of 128, or of
64 or 32 where rows don't divide by that.

A checkpoint's own integers and scales become a matrix whose weights are to the last bit those of the checkpoint,
rounded to the dtype that is computed in. torch's kernels take scales in the dtype of the activations, and 8 bits of
bfloat16 don't hold the 11 of the float16 scales that most checkpoints have. So a scale is the sum of two bfloat16
numbers, and so is an offset: one product is taken with each, which takes twice the time, still a fraction of what a
bfloat16 matrix takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from swarm.weights.dequantize import Integers, Layout

from .matrix import QuantizedMatrix, chunks

_GROUPS = (256, 128, 64, 32)
_ROWS = 64  # the most that lie interleaved in any CPU's layout
_PIECE = 256  # rows of the identity that are multiplied, or of the matrix that are dequantized, at a time


def group_of(width: int, most: int = 128) -> int | None:
    """The size of groups, ``most`` at most, that a row of ``width`` is cut into; ``None``: it can't be cut into any."""
    return next((size for size in _GROUPS if size <= most and width % size == 0), None)


def group_in(layout: Layout, inputs: int) -> int | None:
    """How many inputs share a scale in the kernel: those of the checkpoint, or a part of them. ``None``: it has no such
    groups."""
    group = min(layout.group, inputs)
    return group_of(group, _GROUPS[0]) if inputs % group == 0 else None


class Int4Matrix(QuantizedMatrix):
    """uint8 ``[out, in / 2]`` in the CPU's own layout; ``[in / group, out, 2]`` scales and offsets.

    Args:
        scales: in the dtype of weights that were quantized here; of a checkpoint's own, bfloat16 or float32.
        rest: what bfloat16 leaves of a checkpoint's scales and offsets.
        order: int64 ``[in]``, the inputs in the order of their groups, where those aren't of neighbours.
        exact: the weights are a checkpoint's own, so they are computed in float32 and rounded once.
    """

    many_rows: int | None = 128
    packed: torch.Tensor
    scales: torch.Tensor
    rest: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        group: int,
        *,
        rest: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(scales.shape[1], scales.shape[0] * group)
        self.group, self.exact = group, exact
        for name, part in (("packed", packed), ("scales", scales), ("rest", rest), ("order", order)):
            if part is None:
                setattr(self, name, None)  # unlike a buffer, which every product would have to look up
            else:
                self.register_buffer(name, part)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int4Matrix:
        """The nearest to ``weight`` ``[out, in]``."""
        group = group_of(weight.shape[1])
        assert group is not None
        pieces, scales = [], []
        for chunk in chunks(weight, rows=_ROWS):
            steps, scale = _quantize(chunk, group, cls._scale_dtype(weight.dtype))
            pieces.append(cls._pack(steps))
            scales.append(scale)
        return cls(torch.cat(pieces), torch.cat(scales, dim=1).contiguous(), group)

    @classmethod
    def of(cls, found: Integers, layout: Layout, dtype: torch.dtype) -> Int4Matrix:
        """A matrix of a checkpoint's own integers, for activations of ``dtype``.

        Raises:
            ValueError: the parts don't fit each other.
        """
        out, inputs = found.numbers.shape
        group, groups = group_in(layout, inputs) or inputs, inputs // min(layout.group, inputs)
        order = _order(found.columns, groups)
        if inputs % groups or found.scales.numel() not in (1, out * groups):
            raise ValueError(f"scales {list(found.scales.shape)} don't fit a weight {list(found.numbers.shape)}")
        packed = cls._pack_all(found.numbers, order)
        scale = found.scales.float()
        zero = torch.zeros_like(scale) if found.zeros is None else found.zeros.float()
        pairs = torch.stack(torch.broadcast_tensors(scale, (8 - zero) * scale), dim=-1)
        pairs = pairs.expand(out, groups, 2).transpose(0, 1)
        pairs = pairs.repeat_interleave(inputs // group // groups, 0).contiguous()
        scales = pairs.to(dtype) if dtype == torch.bfloat16 else pairs
        rest = (pairs - scales.float()).to(scales.dtype)
        matrix = cls(packed, scales, group, rest=rest if rest.any() else None, order=order, exact=True)
        matrix.many_rows = 256 if matrix.rest is None else 128
        return matrix

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.scales
        if self.exact and x.dtype != scales.dtype:
            return self.multiply(x.to(scales.dtype)).to(x.dtype)
        rows = (x if self.order is None else x.index_select(1, self.order)).contiguous()
        output = self._product(rows, scales)
        return output if self.rest is None else output + self._product(rows, self.rest)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.exact and not self._interleaved():
            return self._of_identity(self.scales).to(dtype)
        inner = torch.float32 if self.exact else dtype
        scales = self.scales.to(inner) if self.rest is None else self.scales.to(inner) + self.rest
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.packed.device)
        direct = inner == dtype and self.order is None
        start = 0
        for steps in self._steps():
            rows = slice(start, start := start + len(steps))
            part = whole[rows] if direct else steps.new_empty(steps.shape, dtype=inner)
            scale, offset = scales[:, rows].transpose(0, 1)[..., None].unbind(2)
            part.copy_(steps).sub_(8).view(len(steps), -1, self.group).mul_(scale).add_(offset)
            if not direct:
                whole[rows if self.order is None else (rows, self.order)] = part.to(dtype)
        return whole

    @classmethod
    def size(cls, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix, of weights that are quantized here."""
        groups = in_features // (group_of(in_features) or in_features)
        return out_features * (in_features // 2 + groups * 2 * cls._scale_dtype(dtype).itemsize)

    @staticmethod
    def size_of(layout: Layout, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix of a checkpoint's own integers, at most."""
        groups = in_features // (group_in(layout, in_features) or in_features)
        pair = 4 if layout.short and dtype == torch.bfloat16 else 8
        return out_features * (in_features // 2 + groups * pair) + (8 * in_features if layout.ordered else 0)

    @classmethod
    def _pack_all(cls, numbers: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        whole, done = torch.empty(0), 0
        for chunk in chunks(numbers, rows=_ROWS):
            packed = cls._pack(chunk if order is None else chunk[:, order])
            if not done:
                whole = packed.new_empty(len(packed) * len(numbers) // len(chunk), *packed.shape[1:])
            whole[done : done + len(packed)] = packed
            done += len(packed)
        return whole

    @staticmethod
    def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype

    @staticmethod
    def _pack(steps: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.to(torch.int32), 1)

    def _product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, scales)
        return output

    def _interleaved(self) -> int:
        """How many rows lie interleaved in ``packed``; 0: its layout is not known."""
        rows = _interleaved_rows()
        return rows if rows and self.out_features % rows == 0 else 0

    def _steps(self) -> Iterator[torch.Tensor]:
        """Steps ``[rows, in]`` for some rows at a time; of all where the layout isn't known."""
        if rows := self._interleaved():
            for part in self.packed.split(_PIECE):
                yield _unpack(part, rows)
            return
        plain = torch.ones_like(self.scales)
        plain[..., 1] = 8
        yield self._of_identity(plain)

    def _of_identity(self, scales: torch.Tensor) -> torch.Tensor:
        """The weights with ``scales``, and the inputs as they lie: what comes out for the identity."""
        identity = torch.eye(self.in_features, dtype=scales.dtype, device=scales.device)
        return torch.cat([self._product(rows, scales) for rows in identity.split(_PIECE)]).T


class CudaInt4Matrix(Int4Matrix):
    """The same with int32 in the layout of tensor cores. Computes in bfloat16: weights that are quantized here whatever
    their dtype, a checkpoint's own if that is the dtype."""

    many_rows = None

    @staticmethod
    def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    @staticmethod
    def _pack(steps: torch.Tensor) -> torch.Tensor:
        tiles = next(tiles for tiles in (8, 4, 2) if steps.shape[1] % (16 * tiles) == 0)
        pairs = (steps[:, ::2] << 4 | steps[:, 1::2]).to(torch.uint8)
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        return packed

    def _product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows_like_scales = rows.to(scales.dtype)
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm(rows_like_scales, self.packed, self.group, scales)
        return output.to(rows.dtype)

    def _interleaved(self) -> int:
        return 0


def _quantize(rows: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps int32 ``[out, in]`` and scales with offsets ``[in / group, out, 2]`` in ``dtype``."""
    groups = rows.float().view(len(rows), -1, group)
    low, high = groups.aminmax(dim=2, keepdim=True)
    # rounded before the steps are chosen, so that they are the nearest to what will be computed with
    scale = ((high - low) / 15).clamp(min=1e-8).to(dtype).float()
    offset = (low + 8 * scale).to(dtype).float()
    steps = ((groups - offset) / scale + 8).round_().clamp_(0, 15)
    scales = torch.cat((scale, offset), dim=2).transpose(0, 1).contiguous()
    return steps.to(torch.int32).view(rows.shape), scales.to(dtype)


def _order(columns: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """The inputs by their groups, int64 ``[in]``; ``None``: so they are."""
    if columns is None:
        return None
    neighbours = torch.arange(len(columns), device=columns.device) // -(-len(columns) // groups)
    if bool((columns == neighbours).all()):
        return None
    if bool((torch.bincount(columns, minlength=groups) * groups != len(columns)).any()):
        raise ValueError("groups of different sizes: --quantization none takes them")
    return torch.argsort(columns, stable=True)


def _unpack(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Steps uint8 ``[out, in]``. In the CPU's layout ``rows`` rows lie interleaved, and a byte holds row ``r`` and row
    ``r + rows / 2`` of one column."""
    out, half = packed.shape
    bytes_ = packed.view(out // rows, 2 * half, rows // 2)
    return torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=1).transpose(2, 3).reshape(out, 2 * half)


@functools.cache
def _interleaved_rows() -> int:
    """How many rows lie interleaved in this CPU's layout; 0: another layout than the one that is known."""
    steps = torch.arange(2 * _ROWS * 32, dtype=torch.int32).view(2 * _ROWS, 32) * 7 // 3 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
    return next((rows for rows in (64, 32, 16) if torch.equal(_unpack(packed, rows).int(), steps)), 0)
