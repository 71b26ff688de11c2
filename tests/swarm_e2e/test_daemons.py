"""The network daemons of nodes and clients are killed: they get others, and the text is the same all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.errors import DaemonError
from tests.swarm_e2e.nodes import Swarm, Zygote, free_port, run_swarm
from tests.swarm_e2e.test_failover import IDS, at_token, generate


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "3:6"), metrics=True) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def expected(whole: PreTrainedModel) -> torch.Tensor:
    return generate(whole, IDS)


def daemon_of(pid: int) -> int | None:
    """The PID of a process's p2pd, if it has one that lives at the moment."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid=,stat=,comm="], capture_output=True, text=True).stdout
    for child, state, name in map(str.split, found.splitlines()):
        if name == "p2pd" and not state.startswith("Z"):  # what has been killed stays until its parent looks
            return int(child)
    return None


def kill_daemon(pid: int) -> None:
    """Ends the p2pd of a process, which has one or is about to."""
    deadline = time.monotonic() + 60
    while (daemon := daemon_of(pid)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(daemon, signal.SIGKILL)
    while daemon_of(pid) == daemon:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [0, 1])
def test_a_nodes_daemon_dies_in_mid_generation(swarm: Swarm, model: Any, expected: torch.Tensor, number: int) -> None:
    """There is no other node with these blocks; the first is the client's only initial peer."""
    node = swarm.nodes[number]
    result = generate(model, IDS, stopping_criteria=[at_token(8, lambda: kill_daemon(node.pid))])
    assert torch.equal(result, expected)
    assert node.alive
    assert node.figures["swarm_daemon_restarts_total"] == 1
    assert node.figures["swarm_daemon_up"] == 1
    assert torch.equal(generate(model, IDS), expected)


def test_a_clients_daemon_dies_in_mid_generation(swarm: Swarm, path: Path, expected: torch.Tensor) -> None:
    peers = [node.wait_ready()["maddrs"][0] for node in swarm.nodes]  # others than those of `model`: not its daemon
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers) as own:
        peer = own._connection.peer

        def die() -> None:
            os.kill(peer.p2p._child.pid, signal.SIGKILL)

        result = generate(own, IDS, stopping_criteria=[at_token(8, die)])
        assert torch.equal(result, expected)
        assert peer.restarts == 1
        view = own._connection._view
        assert all(view._bans.why(node) is None for node in (span.peer_id for span in view._spans))
        die()
        assert torch.equal(generate(own, IDS), expected)
        assert peer.restarts == 2
        deadline = time.monotonic() + 60
        while peer.p2p.lost is None:  # now it dies as soon as it has been started
            with contextlib.suppress(ProcessLookupError):
                die()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with pytest.raises(DaemonError, match="start the process again"):
            generate(own, IDS)


def test_a_node_whose_daemon_can_not_come_back_ends(swarm: Swarm) -> None:
    port = free_port()
    node = swarm.add("0:3", "--port", str(port))
    os.kill(node.pid, signal.SIGSTOP)
    kill_daemon(node.pid)
    with socket.create_server(("127.0.0.1", port)):
        os.kill(node.pid, signal.SIGCONT)
        assert Zygote.wait(node.pid) == 1
    swarm.nodes.remove(node)
    assert "leaving" in [event["event"] for event in node.events()]
    assert "can't be started again" in node.events()[-1]["message"]
