"""Falcon: its blocks compute attention themselves, and broadcast the few KV heads of the new architecture to all
query heads before caching. Here they stay grouped, and attention is the interface's function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.attention import attention_of
from ...compat.modules import FalconAttention, apply_falcon_rotary
from .alibi import alibi_slopes
from .base import Family


class SwarmFalconAttention(FalconAttention):
    """Falcon's attention module, with its weights, over the interface's attention function."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """``hidden_states`` ``[1, N, H]`` in and out. ``alibi`` ``[heads]``; ``layer_past`` is the engine's batch."""
        batch_size, length, _size = hidden_states.shape
        query, key, value = self._grouped(self.query_key_value(hidden_states))
        if position_embeddings is not None:
            query, key = apply_falcon_rotary(query, key, *position_embeddings)
        attention = attention_of(self.config)
        output, _weights = attention(
            self, query, key, value, attention_mask, scaling=self.inv_norm_factor, alibi=alibi, batch=layer_past
        )
        return self.dense(output.reshape(batch_size, length, self.hidden_size)), None

    def _grouped(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``fused`` ``[1, N, *]`` as query ``[1, heads, N, d]`` and key and value ``[1, kv_heads, N, d]``.

        In all three layouts the projection's output is, for each KV head, its queries followed by its key and its
        value: the new architecture has several such groups, multi-query has one, multi-head has one query in each.
        """
        batch_size, length, _size = fused.shape
        groups = self.num_kv_heads
        assert groups is not None
        fused = fused.view(batch_size, length, groups, self.num_heads // groups + 2, self.head_dim)
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        return query, fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)


class FalconFamily(Family):
    """All three kinds of Falcon: 7B (multi-query), 40B and 180B (grouped), RW (multi-head, ALiBi)."""

    def adapt(self, block: nn.Module, config: PreTrainedConfig) -> None:
        attention = block.self_attention
        assert isinstance(attention, FalconAttention)
        # in place: everything but the code stays, parameters and their names too
        attention.__class__ = SwarmFalconAttention

    def position_embeddings(
        self, base: nn.Module, config: PreTrainedConfig, hidden: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        if not config.alibi:
            return super().position_embeddings(base, config, hidden, positions)
        # Falcon adds ALiBi before it scales the logits, our function after. It also makes the biases in bfloat16;
        # slopes that are bfloat16 already round the same way when multiplied by positions (head sizes are powers of
        # four, so the scale is a power of two and rounds nothing).
        slopes = alibi_slopes(config.num_attention_heads).to(hidden.device, torch.bfloat16)
        return slopes / math.sqrt(config.hidden_size // config.num_attention_heads)

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        has_alibi = isinstance(embeddings, torch.Tensor)
        return block(
            hidden,
            alibi=embeddings if has_alibi else None,
            attention_mask=None,
            position_ids=positions,
            layer_past=batch,
            position_embeddings=None if has_alibi else embeddings,
        )[0]
