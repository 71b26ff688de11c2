"""Eight bits a weight, with one scale for each row: absmax quantization, as in LLM.int8() (Dettmers et al., 2022).

On a CPU torch's own operator takes them and leaves the activations as they are. On CUDA it is bitsandbytes' product of
int8 with int8, in which columns of activations with values above 6 are computed in float16, as in the paper.
"""

from __future__ import annotations

import torch

from swarm.weights.dequantize import Integers, Layout

from .bnb import bitsandbytes
from .matrix import QuantizedMatrix, chunks

_OUTLIER = 6.0
_PIECE = 256  # rows that are dequantized at a time


class Int8Matrix(QuantizedMatrix):
    """int8 ``[out, in]`` and scales ``[out]``, on a CPU.

    Args:
        scale: in the dtype of weights that were quantized here; of a checkpoint's own, which are ``exact``, float32.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, *, exact: bool = False) -> None:
        super().__init__(*weight.shape)
        self.exact, self.many_rows = exact, 80 if exact else 24
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int8Matrix:
        """The nearest to ``weight`` ``[out, in]``."""
        pieces, scales = [], []
        for chunk in chunks(weight, rows=1):
            rows = chunk.float()
            scale = (rows.abs().amax(1) / 127).to(weight.dtype)
            scales.append(scale)
            steps = rows / torch.where(scale == 0, 1, scale)[:, None].float()
            pieces.append(steps.round_().clamp_(-127, 127).to(torch.int8))
        return cls(torch.cat(pieces), torch.cat(scales))

    @classmethod
    def of(cls, found: Integers, layout: Layout, dtype: torch.dtype) -> Int8Matrix:
        """A matrix of a checkpoint's own integers.

        Raises:
            ValueError: they have zeros, or scales that don't fit.
        """
        numbers, out = found.numbers, len(found.numbers)
        if numbers.dtype == torch.uint8:
            if found.zeros is None or not (found.zeros == 128).all():
                raise ValueError("8 bits with zeros: --quantization none takes it")
            numbers = (numbers ^ 128).view(torch.int8)
        if found.scales.numel() not in (1, out):
            raise ValueError(f"{found.scales.numel()} scales don't fit {out} rows")
        return cls(numbers.contiguous(), found.scales.float().reshape(-1).expand(out).contiguous(), exact=True)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        weight, scale = self.weight, self.scale
        if not self.exact or x.dtype == scale.dtype:
            return torch._weight_int8pack_mm(x.contiguous(), weight, scale)
        # the kernel takes scales in the dtype of x, which would round them
        output = torch._weight_int8pack_mm(x.contiguous(), weight, torch.ones_like(scale, dtype=x.dtype))
        return (output * scale).to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        weight, scale = self.weight, self.scale[:, None]
        if scale.dtype == dtype:
            return weight.to(dtype).mul_(scale)
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for rows, steps, each in zip(*(part.split(_PIECE) for part in (whole, weight, scale)), strict=True):
            rows.copy_(steps.float().mul_(each))
        return whole

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix, of weights that are quantized here."""
        return out_features * (in_features + dtype.itemsize)

    @staticmethod
    def size_of(layout: Layout, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix of a checkpoint's own integers."""
        return out_features * (in_features + 4)


class CudaInt8Matrix(QuantizedMatrix):
    """int8 ``[out, in]`` and the largest absolute value of each row, float32 ``[out]``."""

    weight: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, weight: torch.Tensor, absmax: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", absmax)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> CudaInt8Matrix:
        """The nearest to ``weight`` ``[out, in]``."""
        quantize = bitsandbytes().functional.int8_vectorwise_quant
        pieces, absmax, _ = zip(*(quantize(chunk.half()) for chunk in chunks(weight, rows=1)), strict=True)
        return cls(torch.cat(pieces), torch.cat(absmax))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        library = bitsandbytes()
        state = library.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = self.weight, self.absmax, False, False
        # float16 is what it computes in, whatever it is given
        output: torch.Tensor = library.matmul(x.half(), self.weight, state=state, threshold=_OUTLIER)
        return output.to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.weight.float() * (self.absmax / 127)[:, None]).to(dtype)

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        return out_features * (in_features + 4)
