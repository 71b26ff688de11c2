"""Llama 4 (text): layers that see only their chunk of the positions, between layers without rotary that see all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...compat.caches import PositionCache
from ...compat.keywords import cache_keyword, with_cache
from .base import Family


class Llama4Family(Family):
    """Scout and Maverick, without their images. Layers without rotary scale queries by position."""

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        config: Any = block.self_attn.config  # type: ignore[union-attr]
        chunked = config.layer_types[block.layer_idx] == "chunked_attention"  # type: ignore[index]
        return block(
            hidden,
            position_embeddings=embeddings,
            attention_mask=None,
            batch=batch,
            attention_chunk=config.attention_chunk_size if chunked else None,
            **with_cache({}, PositionCache(batch, positions), cache_keyword(type(block))),
        )
