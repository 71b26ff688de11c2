"""Eight bits a weight, with one scale for each row: absmax quantization, as in LLM.int8() (Dettmers et al., 2022).

On a CPU torch's own operator takes them and leaves the activations as they are. On CUDA it is bitsandbytes' product of
int8 with int8, in which columns of activations with values above 6 are computed in float16, as in the paper.
"""

from __future__ import annotations

import torch

from .bnb import bitsandbytes
from .matrix import QuantizedMatrix, chunks

_OUTLIER = 6.0


class Int8Matrix(QuantizedMatrix):
    """int8 ``[out, in]`` and scales ``[out]`` in the dtype of the weights, on a CPU."""

    many_rows = 24
    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        pieces, scales = [], []
        for chunk in chunks(weight, rows=1):
            rows = chunk.float()
            scale = (rows.abs().amax(1) / 127).to(weight.dtype)
            scales.append(scale)
            steps = rows / torch.where(scale == 0, 1, scale)[:, None].float()
            pieces.append(steps.round_().clamp_(-127, 127).to(torch.int8))
        self.register_buffer("weight", torch.cat(pieces))
        self.register_buffer("scale", torch.cat(scales))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype).mul_(self.scale.to(dtype)[:, None])

    @staticmethod
    def size(out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of such a matrix."""
        return out_features * (in_features + dtype.itemsize)


class CudaInt8Matrix(QuantizedMatrix):
    """int8 ``[out, in]`` and the largest absolute value of each row, float32 ``[out]``."""

    weight: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        quantize = bitsandbytes().functional.int8_vectorwise_quant
        pieces, absmax, _ = zip(*(quantize(chunk.half()) for chunk in chunks(weight, rows=1)), strict=True)
        self.register_buffer("weight", torch.cat(pieces))
        self.register_buffer("absmax", torch.cat(absmax))

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
