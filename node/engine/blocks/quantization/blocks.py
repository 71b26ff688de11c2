"""Quantizing what is in a transformer block: linear layers, and experts that live in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from swarm.compute.memory import trim

from ..packing import is_plain_linear
from .experts import QuantizedExperts, expert_weights
from .matrices.matrix import QuantizedMatrix
from .schemes import Scheme

_ROUTERS = {"gate", "router"}
"""What small layers are called that choose experts: the choice must not change, and they weigh nothing."""


class QuantizedLinear(nn.Module):
    """A linear layer over a quantized matrix: ``[…, in]`` to ``[…, out]``."""

    bias: torch.Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Differentiable with respect to ``x``."""
        output: torch.Tensor = self.matrix(x)
        return output if self.bias is None else output + self.bias


@dataclass(frozen=True)
class Place:
    """A module that can hold quantized matrices, by where it is.

    Attributes:
        path: its name in the block.
        shapes: ``(matrices, out, in)`` of each of its weights, by the parameter's name.
    """

    parent: nn.Module
    name: str
    path: str
    module: nn.Module
    shapes: Mapping[str, tuple[int, int, int]]


@torch.no_grad()
def quantize_block(block: nn.Module, scheme: Scheme) -> None:
    """Quantizes what ``scheme`` fits in ``block``, one layer after the other, so that only one has its weights twice at
    a time."""
    places = [place for place in find_places(block) if _fits(place, scheme)]
    while places:  # what is done is forgotten, and with it its weights
        place = places.pop()
        setattr(place.parent, place.name, _quantized(place.module, scheme))
    trim()


def quantized_bytes(block: nn.Module, scheme: Scheme | None) -> int:
    """Memory that the weights of ``block``, which may be on the meta device, take once they are quantized."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
    if scheme is None:
        return total
    dtype = next(block.parameters()).dtype
    for place in find_places(block):
        for count, out, size in place.shapes.values() if _fits(place, scheme) else ():
            total -= count * (out * size * dtype.itemsize - scheme.size(out, size, dtype))
    return total


def find_places(block: nn.Module) -> Iterator[Place]:
    """All that is in ``block``, which may be changed meanwhile; without routers."""
    for path, parent in list(block.named_modules()):
        for name, child in list(parent.named_children()):
            if is_plain_linear(child) and name not in _ROUTERS:
                shapes: dict[str, tuple[int, int, int]] = {"weight": (1, child.out_features, child.in_features)}
            elif weights := expert_weights(child):
                shapes = {name: tuple(weight.shape) for name, weight in weights.items()}  # type: ignore[misc]
            else:
                continue
            yield Place(parent, name, f"{path}.{name}" if path else name, child, shapes)


def _fits(place: Place, scheme: Scheme) -> bool:
    return all(scheme.fits(out, size) for _, out, size in place.shapes.values())


def _quantized(module: nn.Module, scheme: Scheme) -> nn.Module:
    if isinstance(module, nn.Linear):
        return QuantizedLinear(scheme.make(module.weight.detach()), module.bias)
    return QuantizedExperts.of(module, scheme.make)
