"""A linear layer whose weights lie in the layout that oneDNN computes in, on a CPU.

A plain linear layer hands its weights to oneDNN in their own layout every time or, one row in float32, multiplies with
one thread. Packed once, a row takes half to three quarters of the time (docs/benchmarks.md). These are the operators
that torch's own compiler uses for frozen weights; where they are missing, nothing can be packed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """Computes what the ``nn.Linear`` that it was made of computes: ``[…, in]`` to ``[…, out]``, in its dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # not a parameter: it has no strides, so nothing but these operators can use it
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """A copy ``[out, in]``, for code that looks at it."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[…, in]``; differentiable with respect to it."""
        if torch.is_grad_enabled() and x.requires_grad:
            output: torch.Tensor = _Differentiable.apply(x, self)
            return output
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        context.layer = layer
        # a copy, since it is a view inside, which the blocks (Falcon's) may not then add to in place
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "none", [], "").clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ context.layer.packed.to_dense(), None


def can_pack(weight: torch.Tensor) -> bool:
    """Whether ``weight`` can be packed, here and with this torch."""
    return weight.device.type == "cpu" and weight.layout == torch.strided and _works(weight.dtype)


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this machine, packs and computes right in ``dtype``."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        probe = nn.Linear(64, 48, bias=True, dtype=dtype).requires_grad_(False)
        x = torch.linspace(-1, 1, 2 * 64).view(2, 64).to(dtype)
        packed = PackedLinear(probe)
        unpacked = packed.packed.to_dense()
        return torch.allclose(packed(x), probe(x), atol=1e-2) and torch.equal(unpacked, probe.weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
