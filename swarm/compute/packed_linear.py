"""A linear layer whose weights lie in the layout that oneDNN computes in, on a CPU.

A plain linear layer hands its weights to oneDNN in their own layout every time or, one row in float32, multiplies with
one thread. Packed once, a row takes half to three quarters of the time (docs/benchmarks.md). These are the operators
that torch's own compiler uses for frozen weights; where they are missing, nothing can be packed.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from .frozen_product import FrozenProduct
from .memory import discard

_LARGE, _PIECES = 64 << 20, 4
"""Weights of so many bytes are packed in so many pieces. While one is packed it is there twice: of a block of Falcon
180B, whose largest two matrices are four fifths of it, that is a tenth, not two fifths."""
_FEW, _SLOW_BYTES = 4, 4 << 20
"""oneDNN multiplies one, two or three bfloat16 rows with weights of so many bytes more slowly than four
(docs/benchmarks.md), so they are filled up to four."""
_KEPT = 1 << 20
"""Weights of fewer bytes may be kept by the C library for a while when they are no longer used."""


class PackedLinear(nn.Module):
    """Computes what the ``nn.Linear`` that it was made of computes: ``[…, in]`` to ``[…, out]``, in its dtype.

    The weights of ``linear`` are given up while they are packed, and it is of no use afterwards, unless ``keep``.
    """

    def __init__(self, linear: nn.Linear, *, keep: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        large = weight.nbytes >= _LARGE
        self._rows = -(-self.out_features // _PIECES) if large else self.out_features
        # not parameters: they have no strides, so nothing but these operators can use them
        self._packed = []
        self._least = _FEW if weight.dtype == torch.bfloat16 and weight.nbytes >= _SLOW_BYTES else 1
        for piece in weight.split(self._rows):
            self._packed.append(torch.ops.mkldnn._reorder_linear_weight(piece, 1))
            if not keep and weight.nbytes >= _KEPT:
                discard(piece)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """A copy ``[out, in]``, for code that looks at it."""
        if len(self._packed) == 1:
            return self._packed[0].to_dense()
        whole = torch.empty(self.out_features, self.in_features, dtype=self._packed[0].dtype)
        for rows, piece in zip(whole.split(self._rows), self._packed, strict=True):
            rows.copy_(piece.to_dense())
        return whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[…, in]``; differentiable with respect to it."""
        if torch.is_grad_enabled() and x.requires_grad:
            # a copy, since it is a view inside, which the blocks (Falcon's) may not then add to in place
            output: torch.Tensor = FrozenProduct.apply(x, lambda x: self.compute(x).clone(), lambda _: self.weight)
            return output
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`forward`, not differentiable."""
        rows = x.shape[:-1].numel()
        if 0 < rows < self._least:
            few = x.reshape(rows, self.in_features)
            more = few.expand(self._least, -1) if rows == 1 else functional.pad(few, (0, 0, 0, self._least - rows))
            return self._multiply(more)[:rows].view(*x.shape[:-1], self.out_features)
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        biases = [None] * len(self._packed) if self.bias is None else self.bias.split(self._rows)
        outputs = [
            torch.ops.mkldnn._linear_pointwise(x, piece, bias, "none", [], "")
            for piece, bias in zip(self._packed, biases, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_pack(weight: torch.Tensor) -> bool:
    """Whether ``weight`` can be packed, here and with this torch."""
    return weight.device.type == "cpu" and weight.layout == torch.strided and _works(weight.dtype)


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this machine, packs and computes right in ``dtype``."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        probe = nn.Linear(64, 48, bias=True, device="meta", dtype=dtype).to_empty(device="cpu").requires_grad_(False)
        for parameter in probe.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        x = torch.linspace(-1, 1, 2 * 64).view(2, 64).to(dtype)
        packed = PackedLinear(probe)
        return torch.allclose(packed(x), probe(x), atol=1e-2) and torch.equal(packed.weight, probe.weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
