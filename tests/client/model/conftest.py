"""A model over engines in this process, and the same whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from swarm.model.load_ends import load_ends
from swarm.model.source import resolve
from tests.client.in_process import InProcessConnection
from tests.models import tiny_model

FAMILIES = ["llama-gqa", "mistral-window", "mixtral", "bloom", "falcon-180b", "falcon-7b", "falcon-rw"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}


@dataclass
class Pair:
    """The same model over engines, and whole."""

    mine: Any
    whole: PreTrainedModel
    connection: InProcessConnection

    def same(self, ids: Tensor, **options: Any) -> Tensor:
        """What both generate, which has to be equal; no session is left open."""
        made = []
        for model in (self.mine, self.whole):
            set_seed(5)
            made.append(model.generate(ids, **(OPTIONS | options)))
        assert made[0].tolist() == made[1].tolist()
        result: Tensor = made[0]
        return result

    def all_closed(self) -> bool:
        return all(session.closed for session in self.connection.sessions)


def make_pair(like: str) -> Pair:
    path = tiny_model(like, layers=4)
    connection: Any = InProcessConnection(path)
    mine = SwarmModelForCausalLM.from_ends(load_ends(resolve(str(path))), connection)
    # With its usual attention, SDPA: for Falcon with ALiBi transformers' eager attention computes something else.
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return Pair(mine, whole, connection)


@pytest.fixture(scope="module")
def get_pair() -> Iterator[Callable[[str], Pair]]:
    pairs: dict[str, Pair] = {}

    def get(like: str) -> Pair:
        if like not in pairs:
            pairs[like] = make_pair(like)
        pairs[like].connection.sessions.clear()
        return pairs[like]

    yield get
    for pair in pairs.values():
        pair.mine.close()


@pytest.fixture
def pair(get_pair: Callable[[str], Pair]) -> Pair:
    return get_pair("llama-gqa")


@pytest.fixture(params=FAMILIES)
def each(request: pytest.FixtureRequest, get_pair: Callable[[str], Pair]) -> Pair:
    return get_pair(request.param)


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4 * max(1.0, float(theirs.detach().abs().max())), rtol=0)


def small_draft() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama-gqa", layers=1)).eval()
