"""How a family of models is run block by block over our attention function: what most of them need, and the hooks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from swarm.families.mixers import BatchCache, adapt_mixers, has_mixers

ATTENTION = "swarm_paged"
"""The name under which the engine registers its attention function with transformers' ``AttentionInterface``."""


class Family:
    """The generic path: blocks that take their attention from transformers' interface.

    Extra keywords of a block's call reach the attention function there, which is how ``batch`` gets to it.
    """

    def adapt(self, block: nn.Module, config: PreTrainedConfig) -> None:
        """Make a block take its attention from the interface. Weights and their names stay as they are."""
        adapt_mixers(block)

    def buffer(self, module: nn.Module, name: str, config: PreTrainedConfig) -> torch.Tensor | None:
        """The value of a buffer that no checkpoint holds and that transformers doesn't compute module by module."""
        return None

    def adapt_trunk(self, trunk: nn.Module) -> None:
        """Make the module around a client's one layer, which stands for all blocks, ready for :meth:`pack`."""

    def pack(self, hidden: torch.Tensor, given: tuple[Any, ...]) -> torch.Tensor:
        """What goes to the first block as ``[rows, T, carried]``, from what the trunk calls its layer with: ``hidden``
        and ``given``, the other positional arguments."""
        return hidden

    def unpack(self, carried: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        """Hidden states in the shape that the trunk goes on with, from the last block's ``[rows, T, carried]``."""
        return carried

    def position_embeddings(
        self, base: nn.Module, config: PreTrainedConfig, hidden: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        """Position embeddings for a batch, as the blocks take them; a dict by layer type if its kinds of blocks differ.

        Args:
            base: the module that holds the list of blocks, with its buffers in place.
            hidden: ``[1, N, H]``, for its dtype and device.
            positions: ``[1, N]`` int64.
        """
        rotary = getattr(base, "rotary_emb", None)
        if rotary is None:
            return None
        if _by_layer_type(type(rotary)):  # type: ignore[arg-type]
            return {kind: rotary(hidden, positions, kind) for kind in sorted(set(config.layer_types))}
        if getattr(rotary, "rope_type", None) in ("dynamic", "longrope"):
            return _by_row(rotary, hidden, positions)
        return rotary(hidden, positions)

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        """One block. ``hidden`` ``[1, N, H]`` in and out; ``positions`` ``[1, N]``; ``embeddings`` for its kind."""
        options = {"past_key_values": BatchCache(batch)} if has_mixers(block) else {}
        output = block(
            hidden,
            position_embeddings=embeddings,
            position_ids=positions,
            attention_mask=None,
            batch=batch,
            **options,
        )
        return output[0] if isinstance(output, tuple) else output


@functools.cache
def _by_layer_type(rotary: type[nn.Module]) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _by_row(rotary: Any, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotary embeddings whose frequencies hang on the length of the sequence, so far as its tokens are in the batch."""
    starts = (positions[0].diff() != 1).nonzero().flatten() + 1
    parts = []
    for row in positions.tensor_split(starts.cpu(), dim=1):
        # nothing of the sequence before
        rotary.inv_freq.copy_(rotary.original_inv_freq)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        parts.append(rotary(hidden, row))
    return tuple(torch.cat(several, dim=1) for several in zip(*parts, strict=True))
