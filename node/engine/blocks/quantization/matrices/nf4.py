"""Four bits a weight in the NormalFloat code, with a scale for every 64 of a row: NF4 of QLoRA (Dettmers et al., 2023).

The code and the kernels are bitsandbytes'. On CUDA scales are quantized too ("double quantization"), on a CPU they are
bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarm.weights.dequantize import Codes, Layout

from .bnb import bitsandbytes, has_cpu_kernel
from .matrix import QuantizedMatrix, chunks

GROUP = 64
_ROWS = 32  # that lie interleaved in the layout of the CPU's kernel


class NF4Matrix(QuantizedMatrix):
    """uint8 ``[out, in / 2]`` and scales bfloat16 ``[in / 64, out]``, on a CPU.

    The kernel takes bfloat16, on processors that compute with it (AVX-512). Elsewhere, and for other dtypes, the matrix
    is dequantized each time, which is correct and slow.
    """

    many_rows = 192
    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, code: torch.Tensor, group: int, kind: str) -> None:
        super().__init__(packed.shape[0], 2 * packed.shape[1])
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.code, self.group, self.kind = code, group, kind  # 16 floats, the same for all

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> NF4Matrix:
        """The nearest to ``weight`` ``[out, in]``."""
        functional = bitsandbytes().functional
        pieces, scales = [], []
        for chunk in chunks(weight, rows=_ROWS):
            quantized, state = functional.quantize_4bit(chunk.contiguous(), blocksize=GROUP, quant_type="nf4")
            pieces.append(_interleave(quantized.view(len(chunk), -1)))
            scales.append(state.absmax.view(len(chunk), -1).T.to(torch.bfloat16))
        return cls(torch.cat(pieces), torch.cat(scales, dim=1).contiguous(), state.code, GROUP, "nf4")

    @classmethod
    def of(cls, found: Codes, layout: Layout, dtype: torch.dtype) -> NF4Matrix:
        """A matrix of a checkpoint's own codes, NF4 or FP4, whose scales are rounded to bfloat16.

        Raises:
            ValueError: the parts don't fit each other.
        """
        _check_scales(found, layout)
        packed = torch.cat([_interleave(rows) for rows in chunks(found.numbers, rows=_ROWS)])
        return cls(packed, found.scales.T.to(torch.bfloat16).contiguous(), found.code, layout.group, found.kind)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16 or not has_cpu_kernel():
            return nn.functional.linear(x, self.dequantize(x.dtype))
        output: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x.contiguous(), self.packed, (self.out_features, self.in_features), self.scale, self.code, self.group
        )
        return output

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        output: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            _part(self.packed),
            self.scale.T.float().contiguous().view(-1),
            self.group,
            self.kind,
            (self.out_features, self.in_features),
            dtype,
        )
        return output

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        return out_features * (in_features // 2 + in_features // GROUP * 2)


class CudaNF4Matrix(QuantizedMatrix):
    """bitsandbytes' own layout and state."""

    packed: torch.Tensor

    def __init__(self, packed: torch.Tensor, state: Any) -> None:
        super().__init__(*state.shape)
        self.register_buffer("packed", packed)
        self.state = state

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> CudaNF4Matrix:
        """The nearest to ``weight`` ``[out, in]``."""
        return cls(
            *bitsandbytes().functional.quantize_4bit(
                weight.contiguous(), blocksize=GROUP, compress_statistics=True, quant_type="nf4"
            )
        )

    @classmethod
    def of(cls, found: Codes, layout: Layout, dtype: torch.dtype) -> CudaNF4Matrix:
        """A matrix of a checkpoint's own codes, NF4 or FP4.

        Raises:
            ValueError: the parts don't fit each other.
        """
        _check_scales(found, layout)
        shape = torch.Size((len(found.numbers), 2 * found.numbers.shape[1]))
        scales = found.scales.reshape(-1).contiguous()
        state = bitsandbytes().functional.QuantState(scales, shape, found.code, layout.group, found.kind, dtype)
        return cls(found.numbers.reshape(-1, 1), state)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = bitsandbytes().matmul_4bit(x, self.packed, quant_state=self.state)
        return output

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        output: torch.Tensor = bitsandbytes().functional.dequantize_4bit(self.packed, self.state)
        return output.to(dtype)

    @property
    def stored_bytes(self) -> int:
        state = self.state
        tensors = [self.packed, state.absmax, state.code]
        if state.nested:
            tensors += (state.offset, state.state2.absmax, state.state2.code)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix: bits, a byte a scale, a float for 256 scales, two tables and the offset."""
        groups = out_features * in_features // GROUP
        return out_features * in_features // 2 + groups + -(-groups // 256) * 4 + 256 * 4 + 16 * 4 + 4


def _check_scales(found: Codes, layout: Layout) -> None:
    wanted = len(found.numbers), 2 * found.numbers.shape[1] // layout.group
    if found.scales.shape != wanted or found.code.shape != (16,):
        raise ValueError(f"scales {list(found.scales.shape)} or a code of {len(found.code)} don't fit")


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """From bitsandbytes' order ``[out, in / 2]`` (the first of two weights in the high bits) to that of its CPU kernel:
    for each 32 rows and each pair of columns, one byte holds the weights of row ``r`` and row ``r + 16``."""
    out, half = rows.shape
    upper, lower = rows.view(out // _ROWS, 2, _ROWS // 2, half).unbind(1)
    first, second = upper >> 4 | lower & 0xF0, upper & 0xF | lower << 4
    return torch.stack((first, second), dim=-1).transpose(1, 2).reshape(out, half)


def _part(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_interleave`."""
    out, half = packed.shape
    first, second = packed.view(out // _ROWS, half, _ROWS // 2, 2).unbind(-1)
    upper, lower = first << 4 | second & 0xF, first & 0xF0 | second >> 4
    return torch.stack((upper, lower), dim=1).transpose(2, 3).reshape(out, half)
