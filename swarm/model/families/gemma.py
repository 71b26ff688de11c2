"""Gemma 3n and Gemma 4 (text): blocks that use the keys and values of earlier ones, and have an input of their own.

What a block is given beside the hidden states is made of each token's id, which only the client has. It makes that for
all blocks at once, as transformers does, and sends it along behind the hidden states: ``[rows, T, H + blocks * size]``.
Gemma 3n has several hidden states side by side (AltUp, arXiv:2301.13310), which travel as ``[rows, T, streams * H]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .base import Family


class Gemma4Family(Family):
    """All sizes of Gemma 4. In the large ones blocks have no input of their own, and nothing is sent along."""

    def adapt_trunk(self, trunk: nn.Module) -> None:
        if not getattr(trunk, "hidden_size_per_layer_input", None):
            return
        project: Any = trunk.project_per_layer_inputs  # to [rows, T, blocks, size], of which each layer gets its part

        def for_one_layer(*args: Any, **kwargs: Any) -> torch.Tensor:
            inputs: torch.Tensor = project(*args, **kwargs)
            return inputs.flatten(2)[:, :, None]

        trunk.project_per_layer_inputs = for_one_layer  # type: ignore[assignment]

    def pack(self, hidden: torch.Tensor, given: tuple[Any, ...]) -> torch.Tensor:
        inputs = [one for one in given if isinstance(one, torch.Tensor)]
        return torch.cat([self._flat(hidden), *inputs], dim=-1)

    def unpack(self, carried: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        return self._apart(carried, config)[0]

    def run(
        self, block: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, embeddings: Any, batch: Any
    ) -> torch.Tensor:
        config: Any = block.config
        states, inputs = self._apart(hidden, config)
        mine = None
        if inputs.shape[-1]:
            mine = inputs.unflatten(-1, (config.num_hidden_layers, -1))[:, :, block.layer_idx]
        output = block(
            states,
            per_layer_input=mine,
            shared_kv_states=batch.shared_kv,
            position_embeddings=embeddings,
            attention_mask=None,
            position_ids=positions,
            batch=batch,
        )
        return torch.cat([self._flat(output), inputs], dim=-1)

    def _apart(self, carried: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states as transformers has them, and the inputs of all blocks."""
        flat, inputs = carried.tensor_split([self._streams(config) * config.hidden_size], dim=-1)
        return self._stacked(flat, config), inputs

    def _streams(self, config: Any) -> int:
        return 1

    def _flat(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def _stacked(self, flat: torch.Tensor, config: Any) -> torch.Tensor:
        return flat


class Gemma3nFamily(Gemma4Family):
    """Both sizes of Gemma 3n, whose hidden states are ``[streams, rows, T, H]``."""

    def _flat(self, states: torch.Tensor) -> torch.Tensor:
        return states.permute(1, 2, 0, 3).flatten(2)

    def _stacked(self, flat: torch.Tensor, config: Any) -> torch.Tensor:
        return flat.unflatten(-1, (-1, config.hidden_size)).permute(2, 0, 1, 3)

    def _streams(self, config: Any) -> int:
        return int(config.altup_num_inputs)
