"""Packs the linear layers of blocks on a CPU; see ``swarm/compute/packed_linear.py``."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from swarm.compat.modules import FalconLinear
from swarm.compute.packed_linear import PackedLinear, can_pack


def pack_block(block: nn.Module) -> None:
    """Packs all linear layers in ``block``, one after the other, so that only one, or a quarter of a large one, has its
    weights twice at a time."""
    for module in [each for each in block.modules() if not is_plain_linear(each)]:  # a list of all keeps all alive
        for name in [
            name for name, child in module.named_children() if is_plain_linear(child) and can_pack(child.weight)
        ]:
            setattr(module, name, PackedLinear(module.get_submodule(name)))  # type: ignore[arg-type]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a linear layer and no more: subclasses, such as routers, do other things too."""
    return type(module) in (nn.Linear, FalconLinear)
