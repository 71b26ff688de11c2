"""The model's blocks as a module: a slice of it computes just those blocks, on whatever nodes serve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swarm.errors import UsageError

if TYPE_CHECKING:
    from ..session.swarm_connection import SwarmConnection


class RemoteBlocks(nn.Module):
    """Blocks ``first:last`` of a model, without a KV cache. Differentiable; slicing gives a narrower range.

    Has no parameters: those are on the nodes, frozen. Gradients flow through to the input.

    Example::

        len(model.blocks)                      # 32
        middle = model.blocks[3:9]             # no network yet
        hidden = middle(hidden)                # [batch, tokens, hidden size] in and out
        hidden = model.blocks[9](hidden)

    Attributes:
        first, last: absolute indices of the blocks, ``last`` excluded.
    """

    def __init__(self, connection: SwarmConnection, first: int, last: int) -> None:
        super().__init__()
        self.connection = connection
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """The blocks of ``index``, which counts within this range as in a list.

        Raises:
            IndexError: an integer out of range.
            UsageError: a slice that is empty or has a step.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1 or start >= stop:
                raise UsageError(f"a range of blocks is not empty and has no step; got {index} of {len(self)} blocks")
            return RemoteBlocks(self.connection, self.first + start, self.first + stop)
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} is not among these {len(self)} blocks")
        start = self.first + index % len(self)
        return RemoteBlocks(self.connection, start, start + 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the blocks make of ``hidden``.

        Args:
            hidden: ``[batch, tokens, hidden size]``, floating, on any device. Every token sees those before it.

        Returns:
            The same shape, dtype and device.

        Raises:
            ValueError: not three-dimensional.
            MissingBlocksError: nobody serves some of the blocks.
        """
        if hidden.ndim != 3:
            raise ValueError(f"hidden states are [batch, tokens, hidden size]; got the shape {tuple(hidden.shape)}")
        adapter = self.connection.active_adapter
        if torch.is_grad_enabled() and hidden.requires_grad:
            result: Tensor = _ThroughBlocks.apply(hidden, self, adapter)
            return result
        return self._run(hidden, adapter)

    def extra_repr(self) -> str:
        return f"{self.first}:{self.last}"

    def _run(self, hidden: Tensor, adapter: str | None) -> Tensor:
        result = self.connection.forward(hidden.detach().cpu(), first=self.first, last=self.last, adapter=adapter)
        return result.to(device=hidden.device, dtype=hidden.dtype)

    def _run_backward(self, hidden: Tensor, grad: Tensor, adapter: str | None) -> Tensor:
        result = self.connection.backward(
            hidden.detach().cpu(), grad.cpu(), first=self.first, last=self.last, adapter=adapter
        )
        return result.to(device=grad.device, dtype=grad.dtype)


class _ThroughBlocks(torch.autograd.Function):
    """Keeps only the input: the nodes compute their activations again when the gradient comes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, blocks: RemoteBlocks, adapter: str | None) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.blocks, ctx.adapter = blocks, adapter
        return blocks._run(hidden, adapter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        return ctx.blocks._run_backward(hidden, grads[0], ctx.adapter), None, None
