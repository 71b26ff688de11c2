"""The two ends of a model by themselves: token ids to hidden states, and hidden states to logits.

The family's own code runs, with blocks between the ends that take the hidden states out or put others in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from swarm.compat.keywords import cache_keyword, with_cache

from .ends import Echo


class _Blocks(Echo):
    """In place of the blocks: keeps what comes, and gives back ``output`` if there is one."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.input: Tensor | None = None
        self._output = output

    def run(self, hidden: Tensor) -> Tensor:
        self.input = hidden
        return hidden if self._output is None else self._output.to(device=hidden.device, dtype=hidden.dtype)


class ModelEnds:
    """The ends of a :class:`swarm.client.SwarmModelForCausalLM`."""

    def __init__(self, model: Any) -> None:
        self._model, self._trunk = model, model.base_model
        self._device = model.get_input_embeddings().weight.device
        self._keyword = cache_keyword(type(self._trunk))
        self._takes_positions = "position_ids" in inspect.signature(self._trunk.forward).parameters

    @torch.inference_mode()
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What the first block gets: ``ids`` and ``positions`` ``[rows, tokens]`` int64 to ``[rows, tokens, H]``."""
        blocks = _Blocks()
        options = {"position_ids": positions.to(self._device)} if self._takes_positions else {}
        self._trunk(input_ids=ids.to(self._device), **self._through(blocks), **options)
        assert blocks.input is not None
        return blocks.input.cpu()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[rows, H]``, the last block's output, to ``[rows, vocabulary]`` float32 on the CPU."""
        output = self._model(input_ids=self._nothing(len(hidden), 1), **self._through(_Blocks(hidden[:, None])))
        logits: Tensor = output.logits[:, -1].float().cpu()
        return logits

    @torch.inference_mode()
    def norm(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[rows, tokens, H]`` after the final norm: transformers' ``last_hidden_state``, in float32."""
        rows, tokens, _ = hidden.shape
        output = self._trunk(input_ids=self._nothing(rows, tokens), **self._through(_Blocks(hidden)))
        last: Tensor = output[0].float().cpu()
        return last

    def _through(self, blocks: _Blocks) -> dict[str, Any]:
        return with_cache({"use_cache": False}, blocks, self._keyword)

    def _nothing(self, rows: int, tokens: int) -> Tensor:
        return torch.zeros(rows, tokens, dtype=torch.int64, device=self._device)
