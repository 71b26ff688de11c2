"""Llama 4 (text): layers that see only their chunk of the positions, between layers without rotary that see all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarm.families.base import Family


class _Positions:
    """Stands where the blocks expect a cache: keeps nothing, and knows the position of each token.

    Layers without rotary scale queries by position. They count on from ``get_seq_length()``, which is a number for one
    row; as a tensor it makes the count come out right for tokens of many rows.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._offsets = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self._offsets

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


class Llama4Family(Family):
    """Scout and Maverick, without their images."""

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        config: Any = block.self_attn.config  # type: ignore[union-attr]
        chunked = config.layer_types[block.layer_idx] == "chunked_attention"  # type: ignore[index]
        return block(
            hidden,
            position_embeddings=embeddings,
            attention_mask=None,
            past_key_values=_Positions(positions),
            batch=batch,
            attention_chunk=config.attention_chunk_size if chunked else None,
        )
