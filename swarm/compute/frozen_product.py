"""Products with weights that get no gradients, whatever the weights have become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FrozenProduct(torch.autograd.Function):
    """``apply(x, compute, weight)`` is ``compute(x)`` of ``x`` ``[…, in]``, which must not be a view. Gradients go back
    through ``weight(dtype)`` ``[out, in]``, which is not called before that."""

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
        weight: Callable[[torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        context.weight = weight
        return compute(x)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad @ context.weight(grad.dtype), None, None
