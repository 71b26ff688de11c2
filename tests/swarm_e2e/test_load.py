"""More sessions than the KV cache holds, and sessions that are idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from tests.swarm_e2e.nodes import Swarm, run_swarm

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    options = ("--cache-tokens", "256", "--idle-timeout", "3", "--idle-seconds", "1")
    with run_swarm(path, ("0:3", "3:6"), *options) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(path: Path, swarm: Swarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(
        str(path), initial_peers=swarm.initial_peers, wait_timeout=120.0
    ) as model:
        yield model


def prompt(number: int, columns: int) -> torch.Tensor:
    return torch.randint(10, 250, (1, columns), generator=torch.Generator().manual_seed(number))


def test_sixty_four_sessions_on_a_cache_for_five_all_finish(model: Any, whole: PreTrainedModel) -> None:
    """Each needs three pages and has one at first: let in all at once, none of them could finish."""
    prompts = [prompt(number, 10) for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda ids: model.generate(ids, max_new_tokens=24, **QUIET), prompts))
    expected = whole.generate(torch.cat(prompts), max_new_tokens=24, **QUIET)
    assert torch.equal(torch.cat(results), expected)


def test_an_idle_session_gives_way_and_goes_on_later(
    model: Any, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    ids, other = prompt(100, 120), prompt(101, 120)
    session = model.session(max_length=200)
    before = model.generate(ids, max_new_tokens=5, session=session, **QUIET)
    assert torch.equal(
        model.generate(other, max_new_tokens=60, **QUIET), whole.generate(other, max_new_tokens=60, **QUIET)
    )
    after = model.generate(before, max_new_tokens=40, session=session, **QUIET)
    session.close()
    assert "idle for" in caplog.text
    assert torch.equal(after, whole.generate(ids, max_new_tokens=45, **QUIET))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_session_is_idle_for_longer_than_the_nodes_allow(
    model: Any, whole: PreTrainedModel, beams: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(102, 30)
    options = {**QUIET, "num_beams": beams, "max_new_tokens": 12}
    calls = 0

    def rest(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            time.sleep(4)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    result = model.generate(ids, stopping_criteria=[rest], **options)
    assert torch.equal(result, whole.generate(ids, **options))
    assert "idle for" in caplog.text
    view = model._connection._view
    assert not any(view._bans.banned(hop.peer_id) for hop in model.last_route), "nothing is wrong with the nodes"
