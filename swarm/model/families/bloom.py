"""BLOOM: its blocks compute attention themselves, with ALiBi; here attention is the interface's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.attention import attention_of
from ...compat.modules import BloomAttention
from .alibi import alibi_slopes
from .base import Family


class SwarmBloomAttention(BloomAttention):
    """BLOOM's attention module, with its weights, over the interface's attention function."""

    config: PreTrainedConfig

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """``hidden_states``, ``residual`` ``[1, N, H]``, as the result; ``alibi`` ``[heads]``; ``layer_past`` is the
        engine's batch."""
        batch_size, length, _size = hidden_states.shape
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        attention = attention_of(self.config)
        output, _weights = attention(
            self, query, key, value, attention_mask, scaling=self.inv_norm_factor, alibi=alibi, batch=layer_past
        )
        return residual + self.dense(output.reshape(batch_size, length, self.hidden_size)), None


class BloomFamily(Family):
    """BLOOM and BLOOMZ."""

    def adapt(self, block: nn.Module, config: PreTrainedConfig) -> None:
        attention = block.self_attention
        assert isinstance(attention, BloomAttention)
        # in place: everything but the code stays, parameters and their names too
        attention.__class__ = SwarmBloomAttention
        # The original keeps none, and the name of the attention function is in it.
        attention.config = config  # type: ignore[assignment]

    def position_embeddings(
        self, base: nn.Module, config: PreTrainedConfig, hidden: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        return alibi_slopes(config.num_attention_heads).to(hidden.device)

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        return block(hidden, alibi=embeddings, attention_mask=None, layer_past=batch)[0]
