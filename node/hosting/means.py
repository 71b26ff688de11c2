"""With what a node serves, whichever blocks it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.model.model_source import ModelSource
from swarm.network.peer import Peer

from ..engine.adapters import Adapter
from ..engine.blocks.quantization import Keep, Scheme
from ..output import Output
from ..settings import NodeSettings
from .placement.memory import Plan
from .weights.sharing import Sharing


@dataclass(frozen=True)
class Means:
    """All that stays as it is while a node runs.

    Attributes:
        sharing: for weights from peers; one that has begun.
        scheme: quantizes the weights; ``None``: nothing does.
        keep: keeps weights of a quantized checkpoint packed; ``None``: nothing does.
        devices: that of each block of a span.
    """

    settings: NodeSettings
    output: Output
    peer: Peer
    source: ModelSource
    sharing: Sharing | None
    plan: Plan
    dtype: torch.dtype
    scheme: Scheme | None
    keep: Keep | None
    devices: Sequence[torch.device]
    adapters: Sequence[Adapter] = ()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of the LoRA adapters that are served beside the base weights."""
        return tuple(adapter.name for adapter in self.adapters)
