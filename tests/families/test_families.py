"""Every family that is listed: the same tokens, logits and states as transformers' whole model.

In one process: real engines with uneven spans, and the client's facade over them. Only the network is left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swarm.client import SwarmModelForCausalLM
from swarm.client.ends.model_ends import ModelEnds
from swarm.compat.whole import load_whole, run_whole
from swarm.model.families import family_of
from swarm.model.family_check.table import CASES, Case
from swarm.model.load_ends import load_ends
from swarm.model.source import resolve
from swarm.node.engine.engine import Engine
from tests.client.in_process import InProcessConnection
from tests.models import make_checkpoint

GRADIENTS = {"llama4_text", "gptj", "qwen3_next", "falcon_h1", "deepseek_v3", "gpt_oss", "falcon-180b", "gemma3n_text"}
GOING_BACK = {"llama4_text", "gemma3_text", "gpt_oss"}  # what they attend to hangs on the position
OPTIONS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@dataclass
class Pair:
    """The same model over engines, and whole."""

    case: Case
    mine: Any
    whole: Any
    connection: InProcessConnection

    def same(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        mine, whole = (model.generate(ids, **OPTIONS, **options) for model in (self.mine, self.whole))
        assert mine.tolist() == whole.tolist()
        result: torch.Tensor = whole
        return result

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the first block, and what comes out of the whole model's last."""
        _, last = run_whole(self.whole, ids)
        return ModelEnds(self.mine).embed(ids, torch.arange(ids.shape[1])[None]), last


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.label)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case: Case = request.param
    path: Path = make_checkpoint(tmp_path_factory.mktemp("family"), case.config(), seed=case.seed)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    connection: Any = InProcessConnection(path, case.spans, max_batch_tokens=7)
    with SwarmModelForCausalLM.from_ends(load_ends(resolve(str(path))), connection) as mine:
        mine(torch.ones(1, 1, dtype=torch.int64))
        assert torch.equal(torch.get_rng_state(), before[0]), "what a program draws afterwards is another than before"
        assert (random.getstate(), str(np.random.get_state())) == before[1:]
        whole = load_whole(path)
        yield Pair(case, mine, whole, connection)


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


def test_logits_and_gradients(pair: Pair) -> None:
    """Gradients of those that have attention, or something beside it, of their own."""
    ids = tokens(2, 21)
    with torch.no_grad():
        close(pair.mine(ids).logits, pair.whole(ids).logits)
    if pair.case.label in GRADIENTS:
        embeddings = pair.whole.get_input_embeddings()(ids[:, :19]).detach()
        mine, theirs = (
            torch.autograd.grad(model(inputs_embeds=given).logits.square().mean(), given)[0]
            for model in (pair.mine, pair.whole)
            for given in [embeddings.clone().requires_grad_()]
        )
        close(mine, theirs)


def test_greedy_tokens(pair: Pair) -> None:
    """A prompt longer than any window here, prefilled in pieces, then more tokens than a window."""
    with pair.mine.session(max_length=40) if pair.case.label in GOING_BACK else nullcontext():
        made = pair.same(tokens(1, 23), max_new_tokens=14)
        assert len(set(made[0, 23:].tolist())) > 4  # or equality would say little
        if pair.case.label in GOING_BACK:  # another end than what the session has
            pair.same(torch.cat([made[:, :26], torch.full((1, 2), 77)], 1), max_new_tokens=6)


def test_beams(pair: Pair) -> None:
    pair.same(tokens(1, 9), max_new_tokens=5, num_beams=3)


def test_sessions_of_different_lengths_in_one_batch(pair: Pair) -> None:
    cuts = {5: (3, 1, 1), 11: (8, 2, 1), 26: (22, 1, 3)}  # columns in all: those of each step
    given = [pair.states(tokens(1, columns, seed=columns)) for columns in cuts]
    states = [before for before, _ in given]
    for engine in pair.connection.engines:
        together = Engine(engine.span, cache_tokens=512, page_size=4, max_batch_tokens=32)
        together._running = True  # what is queued before the thread starts is packed together for certain
        queued = []
        for hidden, steps in zip(states, cuts.values(), strict=True):
            session = together.open(rows=1, first=engine.span.start, last=engine.span.end)
            parts = hidden.split(steps, dim=1)
            starts = [sum(steps[:number]) for number in range(len(steps))]
            queued.append([together.step(session, part, start=at) for part, at in zip(parts, starts, strict=True)])
        together.start()
        states = [torch.cat([step.result(timeout=60) for step in steps], dim=1) for steps in queued]
        assert together.stats().batches < sum(len(steps) for steps in queued)
        together.stop()
    for mine, (_, expected) in zip(states, given, strict=True):
        config = pair.mine.config
        close(family_of(config.model_type).unpack(mine, config), expected)
