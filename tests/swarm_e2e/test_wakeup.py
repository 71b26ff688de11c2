"""The first step after a long pause has the same tokens: sessions ended, nodes restarted, connections dead."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.client.routing import pulse
from tests.swarm_e2e.nodes import free_port, run_swarm
from tests.swarm_e2e.test_failover import IDS, generate


class Proxy:
    """TCP connections to a port, which can die without either side being told."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._alive: list[threading.Event] = []
        self._dead: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def break_all(self) -> int:
        """Lets nothing through any more over those that are open; how many these are."""
        alive, self._alive = self._alive, []
        for one in alive:
            one.clear()
        return len(alive)

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                alive = threading.Event()
                alive.set()
                self._alive.append(alive)
                threading.Thread(target=self._forward, args=(here, there, alive), daemon=True).start()

    def _forward(self, here: socket.socket, there: socket.socket, alive: threading.Event) -> None:
        with suppress(OSError):  # one side has ended
            self._forward_until_dead(here, there, alive)
        self._dead.append((here, there))  # open for ever, as behind a router that has forgotten them

    @staticmethod
    def _forward_until_dead(here: socket.socket, there: socket.socket, alive: threading.Event) -> None:
        while alive.is_set():
            for ready in select.select([here, there], [], [], 0.05)[0]:
                data = ready.recv(2**16)
                if not data:
                    here.close()
                    there.close()
                    return
                if alive.is_set():
                    (there if ready is here else here).sendall(data)


def goes_on(
    path: Path, whole: PreTrainedModel, initial_peers: list[str], during: Callable[[Any], None]
) -> tuple[Any, float]:
    """A generation that is interrupted by ``during`` is what it is without; the model's view, and how long the first
    token took afterwards."""
    expected = generate(whole, IDS)
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=initial_peers) as model,
        model.session(max_length=64) as session,
    ):
        before = generate(model, IDS, session=session, max_new_tokens=8)
        during(session)
        began = time.monotonic()
        first = generate(model, before, session=session, max_new_tokens=1)
        took = time.monotonic() - began
        result = generate(model, first, session=session, max_new_tokens=expected.shape[1] - first.shape[1])
        assert torch.equal(result, expected)
        print(f"first step after the pause: {took:.2f} s")
        return model._connection._view, took


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_session_has_ended_at_the_nodes(path: Path, whole: PreTrainedModel) -> None:
    def idle(session: Any) -> None:
        wait_until(lambda: all(hop.failed_at is not None for hop in session.route))

    with run_swarm(path, ("0:3", "3:6"), "--idle-timeout", "1") as swarm:
        view, _ = goes_on(path, whole, swarm.initial_peers, idle)
        assert not view._bans._bans


def test_the_only_node_has_restarted(path: Path, whole: PreTrainedModel, tmp_path: Path) -> None:
    identity = ("--identity", str(tmp_path / "second.key"))
    with run_swarm(path, ("0:3",)) as swarm:
        second = swarm.add("3:6", *identity)

        def restart(session: Any) -> None:
            second.kill()
            wait_until(lambda: session.route[1].failed_at is not None)
            assert swarm.add("3:6", *identity).peer_id == str(session.route[1].peer_id)

        goes_on(path, whole, swarm.initial_peers, restart)


@pytest.mark.parametrize("covers", [1, 2])
def test_all_connections_are_dead(
    path: Path, whole: PreTrainedModel, covers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_IDLE_SECONDS", 1.0)
    ports = [free_port() for _ in range(covers)]
    proxies = [Proxy(port) for port in ports]
    broken: list[int] = []

    def sleep(session: Any) -> None:
        time.sleep(1.5)
        broken.extend(proxy.break_all() for proxy in proxies)

    with run_swarm(path, ()) as swarm:
        for port, proxy in zip(ports, proxies, strict=True):
            swarm.add("0:6", "--port", str(port), "--announce", f"/ip4/127.0.0.1/tcp/{proxy.port}")
        goes_on(path, whole, [node.wait_ready()["maddrs"][0] for node in swarm.nodes], sleep)
        assert all(broken), "no connection was there to be broken"
    for proxy in proxies:
        proxy.close()
