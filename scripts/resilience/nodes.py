"""The nodes and the gateway of ``chaos.py`` and ``soak.py``: processes on loopback, each node behind a proxy."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.swarm_e2e import nodes

from .links import Links
from .probe import PROBE, Figures, Probe

END_TIMEOUT = 60.0
_PORTS = itertools.count(15_000 + os.getpid() * 97 % 10_000)  # not those of a script that was started just before


class Zygote(nodes.Zygote):
    """Ours, for several threads."""

    module = "scripts.resilience.zygote"
    _process: subprocess.Popen[str] | None = None
    _lock = threading.Lock()

    @classmethod
    def _ask(cls, order: dict[str, Any]) -> int:
        with cls._lock:
            return super()._ask(order)


@dataclass
class Node:
    """A ``swarm-node serve`` process, and the same again after its death.

    Attributes:
        busy: something is happening to it.
        disk: a small file system for its weights, which come from the others.
    """

    number: int
    blocks: tuple[int, int]
    port: int
    link: int
    identity: Path
    probe: Probe
    metrics: int = 0
    process: nodes.Node | None = None
    busy: bool = False
    disk: Path | None = None

    @property
    def running(self) -> nodes.Node:
        """Its process."""
        assert self.process is not None
        return self.process

    @property
    def serves(self) -> bool:
        """Whether sessions may count on it."""
        return not self.busy and self.process is not None and self.process.alive and self.process.ready is not None

    def figures(self) -> dict[str, float]:
        """Its metrics, by name."""
        return nodes.figures(f"http://127.0.0.1:{self.metrics}/metrics")

    def held(self) -> Figures:
        """What its process holds."""
        return self.probe.figures(self.running.pid)

    def __str__(self) -> str:
        return f"node {self.number}, blocks {self.blocks[0]}:{self.blocks[1]}"


class Swarm:
    """Nodes for these spans of the built-in model; all end with the ``with``. The first one is all others' only
    initial peer, and its own initial peers are those that it has met.

    Args:
        disk: where the last node keeps its weights, which it gets from the others; None: it has them already.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], workdir: Path, disk: Path | None = None) -> None:
        self.workdir, self.links = workdir, Links()
        self.nodes: list[Node] = []
        self.over = threading.Event()
        """No node is started any more."""
        self._lock = threading.Lock()
        for number, span in enumerate(spans):
            port = free_port()
            identity, probe = workdir / f"{number}.key", Probe(workdir / f"{number}.probe")
            self.nodes.append(Node(number, span, port, self.links.open(port), identity, probe))
        self.nodes[-1].disk = disk

    def __enter__(self) -> Swarm:
        try:
            for node in self.nodes:
                self.start(node)
                if node is self.nodes[0]:
                    node.running.wait_ready()
            for node in self.nodes:
                node.running.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        with self._lock:
            running = [node.process for node in self.nodes if node.process is not None and node.process.alive]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.terminate()
        for process in running:
            try:
                process.wait_gone(20)
            except AssertionError:
                process.kill()
        Zygote.close()

    @property
    def peers(self) -> list[str]:
        """The address by which everybody joins."""
        return [self.nodes[0].running.wait_ready()["maddrs"][0]]

    def start(self, node: Node) -> None:
        """Starts it, with the same key and port as before."""
        node.metrics = free_port()
        argv = ["serve", *(("demo", "--seed") if node.disk is None else ("demo-hf", "--weights", "peers"))]
        argv += ["--upload-rate", "0.3"] if node.disk is None else ["--cache-dir", str(node.disk)]
        argv += ["--blocks", f"{node.blocks[0]}:{node.blocks[1]}", "--host", "127.0.0.1", "--port", str(node.port)]
        argv += ["--identity", str(node.identity), "--announce", f"/ip4/127.0.0.1/tcp/{node.link}"]
        argv += ["--metrics-port", str(node.metrics), "--cache-tokens", "16384", "--log-format", "json"]
        argv += [] if node is self.nodes[0] else ["--initial-peers", self._first]
        node.probe.set_clock(0.0)
        with self._lock:
            if self.over.is_set():
                raise RuntimeError("the swarm is being ended")
            environment = {PROBE: str(self.workdir / f"{node.number}.probe")}
            node.process = nodes.Node(argv, self.workdir, zygote=Zygote, env=environment)
        if node is self.nodes[0]:
            self._first = node.process.wait_ready()["maddrs"][0]

    def spare(self, node: Node, num_blocks: int) -> bool:
        """Whether the others cover every block without it."""
        others = [other.blocks for other in self.nodes if other is not node and other.serves]
        return all(any(start <= block < end for start, end in others) for block in range(num_blocks))


class Gateway:
    """``swarm gateway``; ends with the ``with``."""

    def __init__(self, peers: Sequence[str], workdir: Path) -> None:
        self._peers, self._workdir = peers, workdir
        self.probe = Probe(workdir / "gateway.probe")

    def __enter__(self) -> Gateway:
        said, errors = self._workdir / "gateway.out.json", self._workdir / "gateway.err"
        said.touch()
        argv = ["swarm", "gateway", "demo", "--port", "0"]
        argv += [part for peer in self._peers for part in ("--initial-peers", peer)]
        self.pid = Zygote.start(argv, said, errors, env={PROBE: str(self._workdir / "gateway.probe")})
        deadline = time.monotonic() + nodes.START_TIMEOUT
        while not (line := said.read_text().partition("\n")[0]):
            if not alive(self.pid) or time.monotonic() > deadline:
                raise RuntimeError(f"no gateway: {errors.read_text()[-3000:]}")
            time.sleep(0.05)
        self.url = str(json.loads(line)["url"])
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_TIMEOUT
        while alive(self.pid):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.05)

    def held(self) -> Figures:
        """What its process holds."""
        return self.probe.figures(self.pid)

    def figures(self) -> dict[str, float]:
        """Its metrics, by name."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/metrics", timeout=10) as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def daemon_of(pid: int) -> int | None:
    """The process of a process's network daemon, if it has one at the moment."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-x", "p2pd"], capture_output=True, text=True).stdout.split()
    return int(found[0]) if found else None


def free_port() -> int:
    """A TCP port that nobody listens on, nor will take for a connection of its own, as they do those above."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = next(_PORTS)
            probe.bind(("127.0.0.1", port))
            return port
