"""Nodes die in mid-generation; the text is the same all the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from swarm.errors import MissingBlocksError
from tests.swarm_e2e.nodes import Swarm, run_swarm

NEW_TOKENS = 24
IDS = torch.randint(10, 250, (1, 9), generator=torch.Generator().manual_seed(3))
QUIET = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module")
def started(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "0:3", "3:6", "2:6"), metrics=True) as swarm:
        yield swarm


@pytest.fixture
def swarm(started: Swarm) -> Swarm:
    """Each block twice, whatever the tests before have killed."""
    return started.revive()


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    set_seed(11)
    return model.generate(ids, **{**QUIET, **options})


def at_token(number: int, action: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """A stopping criterion that never stops, but does something after so many tokens."""
    calls = 0

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    return criterion


def peers_of(session: Any) -> list[str]:
    return [str(hop.peer_id) for hop in session.route]


@pytest.mark.parametrize("way", WAYS)
def test_a_node_dies(swarm: Swarm, path: Path, whole: PreTrainedModel, way: str) -> None:
    expected = generate(whole, IDS, **WAYS[way])
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
        model.session(max_length=64) as session,
    ):
        before: list[str] = []

        def die() -> None:
            before.extend(peers_of(session))
            swarm.node_of(before[1]).kill()

        result = generate(model, IDS, stopping_criteria=[at_token(8, die)], **WAYS[way])
        assert torch.equal(result, expected)
        assert before[0] == peers_of(session)[0], "the hop that lives is kept"
        assert before[1] not in peers_of(session)


def test_both_hops_die_at_once_and_one_of_them_is_the_first(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, IDS)
    peers = [node.wait_ready()["maddrs"][0] for node in swarm.nodes]  # the client joins by all: any may die
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers) as model,
        model.session(max_length=64) as session,
    ):
        before: list[str] = []

        def die() -> None:
            before.extend(peers_of(session))
            for victim in [swarm.node_of(peer) for peer in before]:
                victim.kill()

        result = generate(model, IDS, stopping_criteria=[at_token(8, die)])
        assert torch.equal(result, expected)
        assert len(before) == 2
        assert set(before).isdisjoint(peers_of(session))


def test_a_node_dies_during_prefill(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    """It has the first half of the text in its cache. It is stopped while the second half comes, and then killed."""
    ids = torch.randint(10, 250, (1, 1800), generator=torch.Generator().manual_seed(4))
    expected = generate(whole, ids, max_new_tokens=4)
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers, prefill_tokens=64) as model,
        model.session(max_length=2048) as session,
    ):
        generate(model, ids[:, :900], session=session, max_new_tokens=1)
        first, second = peers_of(session)
        victim = swarm.node_of(second)

        def done() -> float:
            return swarm.node_of(first).figures['swarm_tokens_total{phase="prefill"}']

        def kill_when_it_runs() -> None:
            deadline = time.monotonic() + 60
            while done() < before + 2 * 64 and time.monotonic() < deadline:
                time.sleep(0.005)
            under_way.append(done() - before)
            victim.kill()

        before, under_way = done(), []
        os.kill(victim.pid, signal.SIGSTOP)
        killer = threading.Thread(target=kill_when_it_runs)
        killer.start()
        result = generate(model, ids, session=session, max_new_tokens=4)
        killer.join()
        assert torch.equal(result, expected)
        assert under_way[0] >= 2 * 64
        assert session.position >= 1800
        assert peers_of(session)[0] == first, "the hop that lives is kept"
        assert second not in peers_of(session)


def test_a_node_stalls(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, IDS)
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers, silence=0.5) as model,
        model.session(max_length=64) as session,
    ):
        stopped: list[str] = []

        def stall() -> None:
            stopped.append(peers_of(session)[1])
            os.kill(swarm.node_of(stopped[0]).pid, signal.SIGSTOP)

        try:
            result = generate(model, IDS, stopping_criteria=[at_token(8, stall)])
        finally:
            for peer in stopped:
                os.kill(swarm.node_of(peer).pid, signal.SIGCONT)
        assert torch.equal(result, expected)
        assert stopped[0] not in peers_of(session)


def test_no_cover_is_waited_for_then_named_and_a_node_that_comes_back_is_used(
    path: Path, whole: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(whole, IDS)
    identity = ("--identity", str(tmp_path / "second.key"))
    with run_swarm(path, ("0:3",)) as swarm:
        second = swarm.add("3:6", *identity)
        peer_id = second.peer_id
        with SwarmModelForCausalLM.from_pretrained(
            str(path), initial_peers=swarm.initial_peers, wait_timeout=1.0
        ) as model:
            assert torch.equal(generate(model, IDS), expected)
            second.kill()
            with pytest.raises(MissingBlocksError, match=r"3:6") as raised:
                generate(model, IDS)
            assert raised.value.blocks == (3, 4, 5)
            assert "waiting up to" in caplog.text

        with (
            SwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=swarm.initial_peers, wait_timeout=60.0
            ) as model,
            model.session(max_length=64) as session,
        ):
            third = swarm.add("3:6", *identity)

            def kill_and_restart() -> None:
                third.kill()
                swarm.add("3:6", *identity, wait=False)

            result = generate(model, IDS, stopping_criteria=[at_token(8, kill_and_restart)])
            assert torch.equal(result, expected)
            assert peers_of(session)[1] == peer_id, "the identity survives, and is used again"


def test_a_node_that_is_told_to_stop_leaves_in_order(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, IDS)
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
        model.session(max_length=64) as session,
    ):
        leaving = []

        def stop() -> None:
            leaving.append(swarm.node_of(peers_of(session)[1]))
            leaving[0].terminate()

        result = generate(model, IDS, stopping_criteria=[at_token(8, stop)])
        assert torch.equal(result, expected)
        assert leaving[0].peer_id not in peers_of(session)
        leaving[0].wait_gone(60)
        assert leaving[0].events()[-1]["event"] == "stopped"
