"""Nodes that freeze in mid-generation, are busy for long, or are far slower than they were."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from tests.swarm_e2e.nodes import Node, Swarm, run_swarm
from tests.swarm_e2e.test_failover import IDS, at_token, generate, peers_of


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "3:6", "3:6")) as swarm:
        yield swarm


def freeze(node: Node) -> None:
    os.kill(node.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def thaw(node: Node) -> None:
    os.kill(node.pid, signal.SIGCONT)


def test_a_frozen_node_is_left_and_used_again_later(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, IDS)
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model:
        frozen: list[Node] = []
        stamps: list[float] = []

        def stop() -> None:
            frozen.append(swarm.node_of(peers_of(session)[1]))
            freeze(frozen[0])

        def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(time.monotonic())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        try:
            with model.session(max_length=64) as session:
                result = generate(model, IDS, stopping_criteria=[at_token(8, stop), stamp])
                assert torch.equal(result, expected)
                assert frozen[0].peer_id not in peers_of(session)
            print(f"pause: {max(after - before for before, after in pairwise(stamps)):.2f} s")
            with model.session(max_length=64) as session:  # it is known by now
                assert torch.equal(generate(model, IDS), expected)
                assert frozen[0].peer_id not in peers_of(session)
        finally:
            for node in frozen:
                thaw(node)
        other = next(node for node in swarm.nodes[1:] if node is not frozen[0])
        freeze(other)  # so that there is no choice
        try:
            with model.session(max_length=64) as session:
                assert torch.equal(generate(model, IDS), expected)
                assert frozen[0].peer_id in peers_of(session)
        finally:
            thaw(other)


def test_the_only_node_is_waited_for(path: Path, whole: PreTrainedModel) -> None:
    """Shorter than ``silence``, its session goes on; longer, it is opened anew over another connection."""
    expected = generate(whole, IDS)
    with (
        run_swarm(path, ("0:6",)) as swarm,
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
    ):
        for seconds, same in ((2.5, True), (9.0, False)):
            hops: list[Any] = []

            def stop(seconds: float = seconds, hops: list[Any] = hops) -> None:
                hops.extend(session.route)
                freeze(swarm.nodes[0])
                threading.Timer(seconds, thaw, [swarm.nodes[0]]).start()

            with model.session(max_length=64) as session:
                assert torch.equal(generate(model, IDS, stopping_criteria=[at_token(8, stop)]), expected)
                assert hops
                assert (session.route == hops) == same


def test_a_long_prefill_under_load_is_no_failure(
    swarm: Swarm, path: Path, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = torch.randint(10, 250, (1, 1900), generator=torch.Generator().manual_seed(5))
    expected_long, expected = generate(whole, long, max_new_tokens=4), generate(whole, IDS)
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model:
        view = model._connection._view
        asked: list[Any] = []
        lives = view.pulse.lives

        def count(peer_id: Any) -> Any:
            asked.append(peer_id)
            return lives(peer_id)

        view.pulse.lives = count
        generate(model, IDS)  # tokens are quick, so whoever waits for others' prefill is overdue
        with ThreadPoolExecutor(6) as pool:
            longs = [pool.submit(generate, model, long, max_new_tokens=4) for _ in range(3)]
            shorts = [pool.submit(generate, model, IDS) for _ in range(3)]
            assert all(torch.equal(work.result(), expected_long) for work in longs)
            assert all(torch.equal(work.result(), expected) for work in shorts)
        assert asked, "nobody was overdue: the load is too small to test anything"
        assert "finding another way" not in caplog.text
        assert not view._bans._bans
