"""Linear layers that read the same input, packed as one: fewer products, each of them wider.

To start a small product takes a good part of its time (docs/benchmarks.md). The block's own code still calls one layer
after the other, so the first one that is called computes for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from swarm.compute.memory import discard
from swarm.compute.packed_linear import PackedLinear, can_pack

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls layers that its blocks hand the same tensor."""
_MOST_BYTES = 32 << 20
"""Beyond that, starting a product is nothing beside it, and the copy that joins them is large."""


class JoinedLinear(nn.Module):
    """One layer of several: ``[…, in]`` to ``[…, out]``. What it returns is part of a larger tensor."""

    def __init__(self, joined: _Joined, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = joined.packed.in_features, joined.sizes[index]
        self._joined, self._index = joined, index

    @property
    def weight(self) -> torch.Tensor:
        """A copy ``[out, in]``, for code that looks at it."""
        return self._joined.packed.weight.split(self._joined.sizes)[self._index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Differentiable with respect to ``x``."""
        return self._joined.part(x, self._index)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"part {self._index} of {self._joined.packed}"


def joined(layers: Sequence[nn.Module]) -> PackedLinear | None:
    """The one layer that computes for all ``layers``, in their order; None if there is none."""
    first = layers[0]
    if not isinstance(first, JoinedLinear) or any(
        getattr(each, "_joined", None) is not first._joined for each in layers
    ):
        return None
    return first._joined.packed


class _Joined:
    """The layers together, which are of no use afterwards, and what came of the input that was given last."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        first, self.sizes = linears[0], [linear.out_features for linear in linears]
        whole = nn.Linear(first.in_features, sum(self.sizes), first.bias is not None, "meta", first.weight.dtype)
        whole.requires_grad_(False).to_empty(device="cpu")
        for part, linear in zip(whole.weight.split(self.sizes), linears, strict=True):
            part.copy_(linear.weight)
            discard(linear.weight)  # or all would be there three times while they are packed
        if first.bias is not None:
            torch.cat([linear.bias for linear in linears], out=whole.bias)
        self.packed = PackedLinear(whole)
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if x is not self._input or index not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self.packed(x).split(self.sizes, -1)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


@torch.no_grad()
def join_linears(block: nn.Module) -> None:
    """Joins and packs the layers in ``block`` that can be."""
    for parent, names in list(_found(block)):
        joined = _Joined([parent.get_submodule(name) for name in names])  # type: ignore[misc]
        for index, name in enumerate(names):
            setattr(parent, name, JoinedLinear(joined, index))


def _found(block: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    for parent in block.modules():
        for names in _SIBLINGS:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(layer) is nn.Linear and can_pack(layer.weight) for layer in layers) and _alike(layers):
                yield parent, names


def _alike(layers: list[nn.Linear]) -> bool:
    kinds = {(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and sum(layer.weight.nbytes for layer in layers) <= _MOST_BYTES
