"""Nodes that restart, a first peer that goes, and clocks that are off: real processes find each other all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.model.source import resolve
from tests.swarm_e2e.nodes import Node, free_port

IDS = torch.randint(10, 250, (1, 9), generator=torch.Generator().manual_seed(3))
QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
AHEAD = 95
OFF = ("the clock of this machine is", f"{AHEAD} s ahead of the swarm's")


class Started:
    """Commands of ``swarm-node`` on loopback, each with an identity and a port of its own, so that it can come back."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self.nodes: list[Node] = []

    def __call__(self, *argv: str, join: str = "") -> Node:
        number = len(self.nodes)
        identity, port = self.identity(number), free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--identity", str(identity), "--log-format", "json"]
        return self._start([*argv, *options, *(("--initial-peers", join) if join else ())])

    def again(self, node: Node) -> Node:
        """The same command once more."""
        return self._start(node.argv)

    def identity(self, number: int) -> Path:
        return self._workdir / f"{number}.key"

    def _start(self, argv: list[str]) -> Node:
        node = Node(argv, self._workdir)
        self.nodes.append(node)
        node.wait_ready()
        return node


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    for node in started.nodes:
        if node.alive:
            node.terminate()
            node.wait_gone(60)


def address(node: Node) -> str:
    return str(node.wait_ready()["maddrs"][0])


def says(node: Node, words: str) -> bool:
    return any(words in event.get("message", "") for event in node.events())


def wait_until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check(model: Any, whole: PreTrainedModel) -> None:
    assert torch.equal(model.generate(IDS, **QUIET), whole.generate(IDS, **QUIET))


def test_the_first_peer_restarts_and_clients_find_the_nodes_by_it(
    start: Started, path: Path, whole: PreTrainedModel
) -> None:
    first = start("bootstrap")
    node = start("serve", str(path), "--blocks", "0:6", join=address(first))
    first.kill()
    start.identity(0).with_name("0.key.peers").unlink(missing_ok=True)  # it forgets whom it knew
    wait_until(lambda: says(node, "is alone"))
    first = start.again(first)
    wait_until(lambda: says(node, "are there again"))
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[address(first)]) as model:
        check(model, whole)
    assert sum("is alone" in event.get("message", "") for event in node.events()) == 1


def test_a_client_outlives_a_restart_of_its_only_node(start: Started, path: Path, whole: PreTrainedModel) -> None:
    node = start("serve", str(path), "--blocks", "0:6")
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[address(node)], update_period=1.0) as model:
        check(model, whole)
        node.kill()
        lookout = model._connection._view.peer.lookout
        wait_until(lambda: lookout.alone)
        start.again(node)
        check(model, whole)
        assert not lookout.alone


def test_a_node_comes_back_when_the_first_peer_is_gone_for_good(
    start: Started, path: Path, whole: PreTrainedModel
) -> None:
    first = start("bootstrap")
    other = start("serve", str(path), "--blocks", "3:6", join=address(first))
    node = start("serve", str(path), "--blocks", "0:3", join=address(first))
    kept = start.identity(2).with_name("2.key.peers")
    wait_until(lambda: kept.exists() and other.peer_id in kept.read_text())
    first.kill()
    node.kill()
    node = start.again(node)
    assert says(node, "trying the peers that were met before")
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[address(node)]) as model:
        check(model, whole)
    assert not first.alive


def test_a_node_that_is_stopped_while_it_starts_leaves_nothing_behind(start: Started, path: Path) -> None:
    first = start("serve", str(path), "--blocks", "3:6")
    argv = ["serve", str(path), "--blocks", "0:3", "--host", "127.0.0.1", "--log-format", "json"]
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[address(first)], update_period=0.02) as model:
        node = Node([*argv, "--initial-peers", address(first)], start.identity(1).parent)
        start.nodes.append(node)
        view = model._connection._view
        wait_until(lambda: view._unusable or node.ready)
        assert node.ready is None, "it was to be stopped before"
        node.terminate()
        node.wait_gone(60)
        wait_until(lambda: not view._unusable, 20)


def test_clocks_that_are_off(start: Started, tmp_path: Path) -> None:
    """A node and a client, each minutes off in another direction."""
    first = start("serve", "demo", "--blocks", "0:4")
    skewed = [sys.executable, "-m", "tests.swarm_e2e.skewed"]
    joining = ["--initial-peers", address(first)]
    serve = ["swarm-node", "serve", "demo", "--blocks", "4:8", "--host", "127.0.0.1", "--log-format", "json"]
    out = tmp_path / "skewed.out"
    with out.open("w") as stream, subprocess.Popen([*skewed, str(AHEAD), *serve, *joining], stdout=stream) as node:
        try:
            wait_until(lambda: '"ready"' in out.read_text() or node.poll() is not None)
            assert all(words in out.read_text() for words in OFF)
            with SwarmModelForCausalLM.from_pretrained("demo", initial_peers=[address(first)]) as model:
                check(model, AutoModelForCausalLM.from_pretrained(resolve("demo").path))
            generate = ["swarm", "generate", "demo", "-p", "The list", "--max-new-tokens", "3", *joining]
            texts = [
                subprocess.run([*skewed, str(ahead), *generate], capture_output=True, text=True, timeout=120)
                for ahead in (0, -200)
            ]
            assert texts[0].stdout, texts[0].stderr
            assert texts[1].stdout == texts[0].stdout
            assert "200 s behind the swarm's" in texts[1].stderr
        finally:
            os.kill(node.pid, signal.SIGTERM)
