"""Whether the ends of a family are computed right here: a tiny model's, with blocks that answer as transformers' do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swarm.model.family_check.check import check_family
from swarm.model.family_check.tiny import NEW, PROMPT, TinyModel, difference
from swarm.model.load_ends import load_ends

from ..ends.model_ends import ModelEnds

logger = logging.getLogger(__name__)
_INPUT, _LOGITS = "hidden states before the first block", "logits"


def require_right_ends(model_type: str, from_ends: Callable[..., Any]) -> None:
    """With versions that aren't tested, checks this family's ends.

    Args:
        from_ends: :meth:`swarm.client.SwarmModelForCausalLM.from_ends`.

    Raises:
        ModelError: they aren't as transformers'.
    """
    check_family(model_type, "ends", lambda tiny: check_ends(tiny, from_ends), logger.warning)


def check_ends(tiny: TinyModel, from_ends: Callable[..., Any]) -> str:
    """Says in what the ends, alone and in ``generate()``, differ from transformers', or nothing."""
    blocks = _KnownBlocks(tiny)
    ids = tiny.ids
    with from_ends(load_ends(tiny.source), blocks) as model, torch.no_grad():
        ends = ModelEnds(model)
        found = [
            difference(_INPUT, ends.embed(ids, torch.arange(ids.shape[1])[None]), tiny.first),
            difference(_LOGITS, ends.logits(tiny.last[0]), tiny.logits[0]),
            difference(_LOGITS, model(ids).logits, tiny.logits),
        ]
        prompt = ids[:, :PROMPT]
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found += blocks.found
    if text.tolist() != ids.tolist():
        found.append(f"greedy tokens are {text[0, PROMPT:].tolist()}, not {ids[0, PROMPT:].tolist()}")
    return next((each for each in found if each), "")


class _KnownBlocks:
    """What :class:`~swarm.client.session.swarm_connection.SwarmConnection` promises, and a session of it: compares
    what comes with what the model's first block gets, and gives what its last one gave."""

    active_adapter = None
    route: tuple[Any, ...] = ()

    def __init__(self, tiny: TinyModel) -> None:
        self._tiny, self.position = tiny, 0
        self.num_blocks = tiny.source.num_blocks
        self.found: list[str] = []

    def session(self, **options: Any) -> _KnownBlocks:
        return self

    def step(self, hidden: Tensor, **options: Any) -> Tensor:
        begin, self.position = self.position, self.position + hidden.shape[1]
        columns = slice(begin, self.position)
        self.found.append(difference(_INPUT, hidden, self._tiny.first[:, columns]))
        return self._tiny.last[:, columns]

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        self.found.append(difference(_INPUT, hidden, self._tiny.first))
        return self._tiny.last

    def close(self) -> None:
        pass
