"""Putting adapters into a span that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from swarm.errors import ModelError
from swarm.model.families.mixers import in_mixer
from swarm.model.span import Span

from .attention.batch import pack_dense
from .blocks.lora import LayerAdapters, Lora
from .executor import run_blocks

_TRIAL = 3  # tokens


class Adapter(Protocol):
    """Where an adapter's weights come from."""

    @property
    def name(self) -> str:
        """In the swarm."""

    def load(self, block: int) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """By the names of layers in the block: ``[rank, in]`` and, scaled, ``[out, rank]``, float32."""


def put_adapters(span: Span, adapters: Sequence[Adapter]) -> None:
    """Loads the span's part of ``adapters`` behind its linear layers, whatever those have become (packed, quantized).

    Raises:
        ModelError: a layer is not computed as one over all tokens here, so it can't have an adapter; or an adapter
            can't be read.
    """
    layers: dict[tuple[int, str], LayerAdapters] = {}
    for adapter in adapters:
        mine: list[tuple[int, str]] = []
        for index in range(span.start, span.end):
            block = span.blocks[index - span.start]
            for name, weights in adapter.load(index).items():
                if in_mixer(block, name):
                    raise _unserved(adapter, span, index, name, "it is part of a layer with recurrent states")
                key = index, name
                if key not in layers:
                    layers[key] = LayerAdapters(block.get_submodule(name))
                layers[key].put(adapter.name, Lora(*(matrix.to(span.device_of(index)) for matrix in weights)))
                mine.append(key)
        _try(span, adapter.name)
        for index, name in mine:
            if adapter.name not in layers[index, name].used:
                raise _unserved(adapter, span, index, name, "its weights are used in another way than as a layer")


@torch.inference_mode()
def _try(span: Span, adapter: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TRIAL, span.hidden_size, generator=generator).to(span.device, span.dtype)
    batch = pack_dense(1, _TRIAL, span.device, adapter)
    try:
        run_blocks(span, hidden, batch, first=span.start, last=span.end)
    except ValueError as error:
        raise ModelError(f"adapter {adapter!r} can't be served on {span.config.model_type}: {error}") from error


def _unserved(adapter: Adapter, span: Span, block: int, name: str, why: str) -> ModelError:
    return ModelError(
        f"adapter {adapter.name!r} can't be served on {span.config.model_type}: "
        f"it changes {name} in block {block}, and {why}"
    )
