"""A node becomes slow in mid-generation; the session moves away from it, once, and the text is the same."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.client.session.trace import RouteEvent
from tests.swarm_e2e.nodes import free_port, run_swarm
from tests.swarm_e2e.test_failover import IDS, at_token, generate, peers_of
from tests.swarm_e2e.test_wakeup import Proxy

SLOW_AT, TOKENS = 30, 100
DELAY = 0.15


class SlowProxy(Proxy):
    """TCP connections to a port, on which all that comes may be late."""

    delay = 0.0

    def _forward(self, here: socket.socket, there: socket.socket, alive: threading.Event) -> None:
        for source, target in ((here, there), (there, here)):
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # nothing else is late
            threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                time.sleep(self.delay)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_node_that_becomes_slow_is_left_once(path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, IDS, max_new_tokens=TOKENS)
    ports = [free_port() for _ in range(2)]
    proxies = [SlowProxy(port) for port in ports]
    events: list[RouteEvent] = []
    stamps: list[float] = []
    left_at: list[int] = []
    slow: list[str] = []

    def told(event: RouteEvent) -> None:
        events.append(event)
        left_at.append(len(stamps))

    def become_slow() -> None:
        route_session(session).on_route = told
        slow.append(peers_of(session)[1])
        nodes = [node.peer_id for node in swarm.nodes[1:]]
        proxies[nodes.index(slow[0])].delay = DELAY

    def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stamps.append(time.monotonic())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    with run_swarm(path, ()) as swarm:
        swarm.add("0:3")
        for port, proxy in zip(ports, proxies, strict=True):
            swarm.add("3:6", "--port", str(port), "--announce", f"/ip4/127.0.0.1/tcp/{proxy.port}")
        with (
            SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
            model.session(max_length=1024) as session,
        ):
            criteria = [stamp, at_token(SLOW_AT, become_slow)]
            result = generate(model, IDS, session=session, max_new_tokens=TOKENS, stopping_criteria=criteria)
            after = peers_of(session)
    for proxy in proxies:
        proxy.close()
    steps = [late - early for early, late in pairwise(stamps)]
    print(f"left at token {left_at}; steps: {[round(1e3 * step) for step in steps]} ms; {events}")
    assert torch.equal(result, expected)
    assert [event.kind for event in events] == ["left", "replaced"], "it did not move, or more than once"
    assert min(steps[SLOW_AT : left_at[0] - 1]) >= DELAY, "it was not slow"
    assert events[0].hops[0].peer == slow[0] not in after
    assert "ms, elsewhere about" in events[0].reason


def route_session(session: Any) -> Any:
    return session.cache._session._divided._parts[0][1]
