"""The blocks that a node serves, ready to run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..compat.rotary import positions_end, rotary_of, varies_with_length
from ..compute.kept_positions import KeptPositions
from .families import Family
from .layout import inner_boundaries
from .probe import KVGeometry


@dataclass(frozen=True)
class Prepared:
    """What all blocks need to know about one batch.

    Attributes:
        positions: ``[1, N]`` int64.
        embeddings: position embeddings as the family's blocks take them (rotary: a pair of ``[1, N, head_dim]``;
            ALiBi: slopes ``[heads]``), or a dict of them by layer type, or None.
    """

    positions: torch.Tensor
    embeddings: Any


@dataclass(frozen=True, eq=False)
class Span:
    """Blocks ``start:end`` of a model, frozen and in evaluation mode.

    Attributes:
        devices: where each block is; blocks on one device are side by side.
        bases: for each device, the module with the buffers that position embeddings are made of.
        kv: of each block, the shape of its KV cache; None: it has none.
        kv_sources: blocks that use the KV cache of another one in the span instead of their own: block to that other.
        state_bytes: what all blocks together keep for each row beside KV (recurrent states); 0 in most models. Such
            states can't be cut back to an earlier token, nor shared as a prefix.
        parameter_bytes: memory of the weights as they are loaded, before they are packed or quantized.
    """

    start: int
    end: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    hidden_size: int
    kv: tuple[KVGeometry | None, ...]
    kv_sources: Mapping[int, int]
    state_bytes: int
    parameter_bytes: int
    config: PreTrainedConfig
    blocks: nn.ModuleList = field(repr=False)
    bases: Mapping[torch.device, nn.Module] = field(repr=False)
    family: Family = field(repr=False)
    kinds: tuple[str, ...] = field(repr=False)

    @functools.cached_property
    def inner_boundaries(self) -> frozenset[int]:
        """Blocks of the model at which nothing may begin or end (:func:`swarm.model.layout.inner_boundaries`)."""
        return inner_boundaries(self.config)

    @property
    def device(self) -> torch.device:
        """Of the first block: where hidden states go in."""
        return self.devices[0]

    def device_of(self, block: int) -> torch.device:
        """Where a block is, by its index in the model."""
        return self.devices[block - self.start]

    def runs(self, first: int, last: int) -> Iterator[tuple[torch.device, int, int]]:
        """The blocks ``first:last`` as ``(device, begin, end)``, one for each stretch on one device."""
        for device, blocks in itertools.groupby(range(first, last), self.device_of):
            stretch = list(blocks)
            yield device, stretch[0], stretch[-1] + 1

    def part(self, first: int, last: int) -> Span:
        """The blocks ``first:last`` of it as a span of their own, the same modules. ``parameter_bytes`` and
        ``state_bytes`` stay those of the whole."""
        own = slice(first - self.start, last - self.start)
        return replace(
            self,
            start=first,
            end=last,
            devices=self.devices[own],
            blocks=nn.ModuleList(list(self.blocks)[own]).eval(),
            kinds=self.kinds[own],
            kv=self.kv[own],
            kv_sources={block: of for block, of in self.kv_sources.items() if first <= block < last},
        )

    @functools.cached_property
    def ropes_vary(self) -> bool:
        """Whether rotary frequencies depend on the longest sequence in a batch, which some ways of scaling do."""
        return varies_with_length(rotary_of(self.bases[self.device]))

    @functools.cached_property
    def _kept(self) -> KeptPositions:
        return KeptPositions(positions_end(rotary_of(self.bases[self.device])))

    def prepare(self, hidden: torch.Tensor, positions: torch.Tensor, *, start: int | None = None) -> Prepared:
        """Position embeddings, once per batch and device. ``hidden`` ``[1, N, H]`` in the span's dtype and on the
        blocks' device (only those are looked at), ``positions`` ``[1, N]`` int64 there too; ``start``, if the positions
        are known to count on from it."""

        def make(positions: torch.Tensor) -> Any:
            base = self.bases.get(hidden.device, self.bases[self.device])
            with torch.no_grad():
                return self.family.position_embeddings(base, self.config, hidden, positions)

        if start is None or self.ropes_vary:
            return Prepared(positions, make(positions))
        return Prepared(positions, self._kept.get(start, positions, make))

    def run(self, block: int, hidden: torch.Tensor, prepared: Prepared, batch: Any) -> torch.Tensor:
        """One block, by its index in the model. ``hidden`` ``[1, N, H]``, and so is the result. Differentiable with
        respect to ``hidden`` unless called under ``no_grad`` or ``inference_mode``.

        Raises:
            IndexError: the block is not in this span.
        """
        if not self.start <= block < self.end:
            raise IndexError(f"block {block} is not in {self.start}:{self.end}")
        embeddings = prepared.embeddings
        if isinstance(embeddings, dict):
            embeddings = embeddings[self.kinds[block - self.start]]
        return self.family.run(self.blocks[block - self.start], hidden, prepared.positions, embeddings, batch)
