"""Four bits a weight in even steps, with a scale and an offset for each group of a row, in torch's own operators.

Groups are of 128 weights, or of 64 or 32 where rows don't divide by that. The value of step q (0 to 15) is
``(q - 8) * scale + offset``.
"""

from __future__ import annotations

import functools

import torch

from .matrix import QuantizedMatrix, chunks

_GROUPS = (128, 64, 32)
_ROWS = 64  # the most that lie interleaved in any CPU's layout
_PIECE = 256  # rows of the identity that are multiplied at a time


def group_of(in_features: int) -> int | None:
    """The size of the groups of a row; ``None``: it can't be cut into any."""
    return next((group for group in _GROUPS if in_features % group == 0), None)


class Int4Matrix(QuantizedMatrix):
    """uint8 ``[out, in / 2]`` in the CPU's own layout, and ``[in / group, out, 2]`` scales and offsets in the dtype of
    the weights."""

    many_rows = 128
    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.group = _group(weight)
        pieces, scales = [], []
        for chunk in chunks(weight, rows=_ROWS):
            steps, scale = _quantize(chunk, self.group, weight.dtype)
            pieces.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1))
            scales.append(scale)
        self.register_buffer("packed", torch.cat(pieces))
        self.register_buffer("scales", torch.cat(scales, dim=1).contiguous())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group, self.scales
        )
        return output

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows = _interleaved_rows()
        if not rows or self.out_features % rows:
            return _multiply_identity(self, self.scales.dtype).to(dtype)
        steps = _unpack(self.packed, rows).view(self.out_features, -1, self.group)
        scale, offset = self.scales.transpose(0, 1).to(dtype)[..., None].unbind(2)
        return (steps.to(dtype) - 8).mul_(scale).add_(offset).view(self.out_features, -1)

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        groups = in_features // (group_of(in_features) or in_features)
        return out_features * (in_features // 2 + groups * 2 * dtype.itemsize)


class CudaInt4Matrix(QuantizedMatrix):
    """int32 in the layout of tensor cores, and bfloat16 ``[in / group, out, 2]`` scales and offsets."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.group = _group(weight)
        pieces, scales = [], []
        for chunk in chunks(weight, rows=_ROWS):
            steps, scale = _quantize(chunk, self.group, torch.bfloat16)
            pieces.append(pack_for_cuda(steps))
            scales.append(scale)
        self.register_buffer("packed", torch.cat(pieces))
        self.register_buffer("scales", torch.cat(scales, dim=1).contiguous())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16).contiguous(), self.packed, self.group, self.scales
        )
        return output.to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return _multiply_identity(self, torch.bfloat16).to(dtype)

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        return Int4Matrix.size(out_features, in_features, torch.bfloat16)


def pack_for_cuda(steps: torch.Tensor) -> torch.Tensor:
    """Steps ``[out, in]`` in the layout of tensor cores."""
    tiles = next(tiles for tiles in (8, 4, 2) if steps.shape[1] % (16 * tiles) == 0)
    pairs = (steps[:, ::2] << 4 | steps[:, 1::2]).to(torch.uint8)
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


def _group(weight: torch.Tensor) -> int:
    group = group_of(weight.shape[1])
    assert group is not None
    return group


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


def _multiply_identity(matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The weights, where their layout is not known: what comes out for the identity, some rows at a time."""
    device = next(matrix.buffers()).device
    identity = torch.eye(matrix.in_features, dtype=dtype, device=device)
    return torch.cat([matrix.multiply(rows) for rows in identity.split(_PIECE)]).T
