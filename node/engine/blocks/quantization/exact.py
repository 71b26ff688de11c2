"""Matrices that are made of a checkpoint's own integers and scales: their weights are to the last bit those of the
checkpoint, rounded to the dtype that is computed in.

torch's kernels take scales in the dtype of the activations, and 8 bits of bfloat16 don't hold the 11 of the float16
scales that most checkpoints have. So a scale is the sum of two bfloat16 numbers, and so is an offset (a scale times 4
bits): one product is taken with each, which takes twice the time, still a fraction of what a bfloat16 matrix takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swarm.weights.dequantize import Integers, Layout

from .int4 import _PIECE, _ROWS, _interleaved_rows, _unpack, pack_for_cuda
from .matrix import QuantizedMatrix, chunks

_GROUPS = (256, 128, 64, 32)
_UNPACKED = 256  # rows that are dequantized at a time


def int4_group(layout: Layout, inputs: int) -> int | None:
    """How many inputs share a scale in the kernel: those of the checkpoint, or a part of them. ``None``: it has no such
    groups."""
    group = min(layout.group, inputs)
    return next((size for size in _GROUPS if group % size == 0), None) if inputs % group == 0 else None


class ExactInt4Matrix(QuantizedMatrix):
    """uint8 ``[out, in / 2]`` in the CPU's own layout; ``[in / group, out, 2]`` scales and offsets, the value of step q
    being ``(q - 8) * scale + offset``, in bfloat16 (with what that leaves of them in another such tensor) or float32.

    Where the checkpoint's groups aren't of neighbours, inputs are put in their order first.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    rest: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, found: Integers, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__(*found.numbers.shape)
        self.group = int4_group(layout, self.in_features) or self.in_features
        groups = self.in_features // min(layout.group, self.in_features)
        self.register_buffer("order", _order(found.columns, groups))
        if self.in_features % groups or found.scales.numel() not in (1, self.out_features * groups):
            raise ValueError(f"scales {list(found.scales.shape)} don't fit a weight {list(found.numbers.shape)}")
        self.register_buffer("packed", self._pack_all(found.numbers))
        scale = found.scales.float()
        zero = torch.zeros_like(scale) if found.zeros is None else found.zeros.float()
        pairs = torch.stack(torch.broadcast_tensors(scale, (8 - zero) * scale), dim=-1)
        pairs = pairs.expand(self.out_features, groups, 2).transpose(0, 1)
        pairs = pairs.repeat_interleave(self.in_features // self.group // groups, 0).contiguous()
        self.register_buffer("scales", pairs.to(dtype) if self._short(dtype) else pairs)
        rest = (pairs - self.scales.float()).to(self.scales.dtype)
        self.register_buffer("rest", rest if rest.any() else None)
        self.many_rows = 256 if self.rest is None else 128

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if self.order is None else x.index_select(1, self.order)
        rows = rows.to(self.scales.dtype).contiguous()
        output = self._product(rows, self.scales)
        if self.rest is not None:
            output = output + self._product(rows, self.rest)
        return output.to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        scales = self.scales.float() if self.rest is None else self.scales.float() + self.rest
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.packed.device)
        start = 0
        for steps in self._steps():
            stop = start + len(steps)
            scale, offset = scales[:, start:stop].transpose(0, 1)[..., None].unbind(2)
            weights = steps.view(len(steps), -1, self.group).mul_(scale).add_(offset).view(len(steps), -1).to(dtype)
            if self.order is None:
                whole[start:stop] = weights
            else:
                whole[start:stop, self.order] = weights
            start = stop
        return whole

    @classmethod
    def size(cls, layout: Layout, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix, at most."""
        groups = in_features // (int4_group(layout, in_features) or in_features)
        pair = 4 if layout.short and cls._short(dtype) else 8
        return out_features * (in_features // 2 + groups * pair) + (8 * in_features if layout.ordered else 0)

    @staticmethod
    def _short(dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def _pack_all(self, numbers: torch.Tensor) -> torch.Tensor:
        whole, done = torch.empty(0), 0
        for chunk in chunks(numbers, rows=_ROWS):
            packed = self._pack(chunk if self.order is None else chunk[:, self.order])
            if not done:
                whole = packed.new_empty(len(packed) * len(numbers) // len(chunk), *packed.shape[1:])
            whole[done : done + len(packed)] = packed
            done += len(packed)
        return whole

    @staticmethod
    def _pack(numbers: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32), 1)

    def _product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, scales)
        return output

    def _steps(self) -> Iterator[torch.Tensor]:
        """Steps less 8, float32 ``[rows, in]``, for some rows at a time."""
        rows = _interleaved_rows()
        if not rows or self.out_features % rows:
            yield self._steps_by_product()
            return
        for part in self.packed.split(_UNPACKED):
            yield _unpack(part, rows).float().sub_(8)

    def _steps_by_product(self) -> torch.Tensor:
        """The same of all rows, where the layout isn't known: what comes out for the identity and scales of 1."""
        scales = torch.zeros_like(self.scales)
        scales[..., 0] = 1
        identity = torch.eye(self.in_features, dtype=scales.dtype, device=scales.device)
        return torch.cat([self._product(rows, scales) for rows in identity.split(_PIECE)]).T.float()


class CudaExactInt4Matrix(ExactInt4Matrix):
    """The same with int32 in the layout of tensor cores. Computes in bfloat16, whatever the dtype."""

    @staticmethod
    def _pack(numbers: torch.Tensor) -> torch.Tensor:
        return pack_for_cuda(numbers)

    def _product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, scales)
        return output

    def _steps(self) -> Iterator[torch.Tensor]:
        yield self._steps_by_product()

    @staticmethod
    def _short(dtype: torch.dtype) -> bool:
        return True


class ExactInt8Matrix(QuantizedMatrix):
    """int8 ``[out, in]`` and scales float32 ``[out]``, on a CPU."""

    many_rows = 80
    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, found: Integers, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__(*found.numbers.shape)
        numbers = found.numbers
        if numbers.dtype == torch.uint8:
            if found.zeros is None or not (found.zeros == 128).all():
                raise ValueError("8 bits with zeros: --quantization none takes it")
            numbers = (numbers ^ 128).view(torch.int8)
        if found.scales.numel() not in (1, self.out_features):
            raise ValueError(f"{found.scales.numel()} scales don't fit {self.out_features} rows")
        self.register_buffer("weight", numbers.contiguous())
        self.register_buffer("scale", found.scales.float().reshape(-1).expand(self.out_features).contiguous())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)
        # the kernel takes scales in the dtype of x, which would round them
        output = torch._weight_int8pack_mm(x.contiguous(), self.weight, torch.ones_like(self.scale, dtype=x.dtype))
        return (output * self.scale).to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for start in range(0, self.out_features, _UNPACKED):
            at = slice(start, start + _UNPACKED)
            whole[at] = self.weight[at].float().mul_(self.scale[at, None])
        return whole

    @staticmethod
    def size(layout: Layout, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        return out_features * (in_features + 4)


def _order(columns: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """The inputs by their groups, int64 ``[in]``; ``None``: so they are."""
    if columns is None or bool((columns == torch.arange(len(columns)) // -(-len(columns) // groups)).all()):
        return None
    if bool((torch.bincount(columns, minlength=groups) * groups != len(columns)).any()):
        raise ValueError("groups of different sizes: --quantization none takes them")
    return torch.argsort(columns, stable=True)
