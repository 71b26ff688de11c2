"""How a family of models is run block by block over our attention function: what most of them need, and the hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.caches import PassingCache
from ...compat.keywords import cache_keyword, with_cache
from ...compat.rotary import embed_positions, rotary_of
from .mixers import adapt_mixers, has_mixers

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
        rotary = rotary_of(base)
        if rotary is None:
            return None
        return embed_positions(rotary, hidden, positions, set(getattr(config, "layer_types", None) or ()))

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        """One block. ``hidden`` ``[1, N, H]`` in and out; ``positions`` ``[1, N]``; ``embeddings`` for its kind."""
        cache = PassingCache(batch) if has_mixers(block) else None
        options = with_cache({}, cache, cache_keyword(type(block)))
        output = block(
            hidden,
            position_embeddings=embeddings,
            position_ids=positions,
            attention_mask=None,
            batch=batch,
            **options,
        )
        return output[0] if isinstance(output, tuple) else output
