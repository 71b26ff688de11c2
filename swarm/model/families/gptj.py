"""GPT-J: before transformers 5.24 its blocks compute attention themselves; here it is the interface's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.attention import attention_of
from ...compat.modules import GPTJAttention
from .base import Family


class SwarmGPTJAttention(GPTJAttention):
    """GPT-J's attention module, with its weights and its rotary positions, over the interface's attention function."""

    def _attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        """``[1, heads, N, head_dim]`` all and the result; ``attention_mask`` is the engine's batch."""
        attention = attention_of(self.config)
        output, _ = attention(self, query, key, value, None, scaling=self.head_dim**-0.5, batch=attention_mask)
        return output.transpose(1, 2), None


class GPTJFamily(Family):
    """GPT-J 6B and what was made of it."""

    def adapt(self, block: nn.Module, config: PreTrainedConfig) -> None:
        attention = block.attn
        assert isinstance(attention, GPTJAttention)
        if hasattr(attention, "_attn"):
            # in place: everything but the code stays, parameters and their names too
            attention.__class__ = SwarmGPTJAttention

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        if not isinstance(block.attn, SwarmGPTJAttention):
            return super().run(block, hidden, positions, embeddings, batch)
        # The module looks at its mask in nothing but the method that is replaced, so the batch travels in its place.
        return block(hidden, attention_mask=batch, position_ids=positions)[0]
