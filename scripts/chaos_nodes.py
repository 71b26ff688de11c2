"""The nodes of ``chaos.py``: processes on loopback, each behind a proxy, and what can happen to them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NODE = (sys.executable, "-c", "from swarm.node.cli import main; main()")
START_TIMEOUT = 120.0
_PORTS = itertools.count(15_000 + os.getpid() % 10_000)


class Links:
    """A proxy in front of each node's port: all that others send goes through it. Runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.delay: dict[int, float] = {}
        """Seconds by which what goes to a port, and comes from it, is late; infinite: nothing passes."""

    def open(self, target: int) -> int:
        """A port that leads to this one."""

        async def serve() -> int:
            server = await asyncio.start_server(lambda r, w: self._join(r, w, target), "127.0.0.1", 0)
            return int(server.sockets[0].getsockname()[1])

        return asyncio.run_coroutine_threadsafe(serve(), self._loop).result(10)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back, target), self._pass(there, writer, target))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                due = self._loop.time() + self.delay.get(target, 0.0)
                while self._loop.time() < due:
                    await asyncio.sleep(0.05)
                    if not self.delay.get(target, 0.0):
                        break
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Node:
    """A ``swarm-node serve`` process, and the same again after its death."""

    blocks: tuple[int, int]
    port: int
    link: int
    identity: Path
    process: subprocess.Popen[str] | None = None
    ready: dict[str, Any] | None = None
    metrics: int = 0
    busy: bool = False
    """Something is happening to it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def serves(self) -> bool:
        """Whether sessions may count on it."""
        return not self.busy and self.ready is not None and self.process is not None and self.process.poll() is None


class Swarm:
    """Nodes for these spans of ``model``, whose logs go to ``workdir``; all end with the ``with``."""

    def __init__(self, model: str, spans: Sequence[tuple[int, int]], workdir: Path) -> None:
        self.model, self.workdir, self.links = model, workdir, Links()
        self.nodes: list[Node] = []
        for number, span in enumerate(spans):
            port = free_port()
            self.nodes.append(Node(span, port, self.links.open(port), workdir / f"{number}.key"))

    def __enter__(self) -> Swarm:
        try:
            for node in self.nodes:
                self.start(node)
                if node is self.nodes[0]:
                    self.wait(node)
            for node in self.nodes:
                self.wait(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        running = [node.process for node in self.nodes if node.process is not None and node.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def peers(self) -> list[str]:
        """Addresses of all nodes that have ever been ready."""
        return [node.ready["maddrs"][0] for node in self.nodes if node.ready is not None]

    def start(self, node: Node) -> None:
        """Starts it, with the same key and port as before."""
        peers = [peer for peer in self.peers if node.ready is None or peer != node.ready["maddrs"][0]]
        node.metrics = free_port()
        command = [*NODE, "serve", self.model, "--blocks", f"{node.blocks[0]}:{node.blocks[1]}"]
        command += ["--host", "127.0.0.1", "--port", str(node.port), "--identity", str(node.identity)]
        command += ["--announce", f"/ip4/127.0.0.1/tcp/{node.link}", "--log-format", "json"]
        command += ["--metrics-port", str(node.metrics), "--cache-tokens", "16384"]
        command += [part for peer in peers for part in ("--initial-peers", peer)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SWARM_")}
        environment["OMP_NUM_THREADS"] = "1"
        with (self.workdir / f"{node.identity.stem}.log").open("a") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
            )
        node.process, was = process, node.ready
        node.ready = None
        threading.Thread(target=_follow, args=(node, process, was), daemon=True).start()

    def wait(self, node: Node) -> None:
        """Until it serves."""
        deadline = time.monotonic() + START_TIMEOUT
        while node.ready is None:
            assert node.process is not None
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"Error: the node for {node.blocks} did not start: see {self.workdir}")
            time.sleep(0.05)

    def spare(self, node: Node, num_blocks: int) -> bool:
        """Whether the others cover every block without it."""
        others = [other.blocks for other in self.nodes if other is not node and other.serves]
        return all(any(start <= block < end for start, end in others) for block in range(num_blocks))

    def daemon_of(self, node: Node) -> int | None:
        """The process of its network daemon."""
        assert node.process is not None
        children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
        named = (pid for pid in children if "p2pd" in Path(f"/proc/{pid}/cmdline").read_text())
        return next(map(int, named), None)

    def figures(self, node: Node) -> dict[str, float]:
        """Its metrics, by name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics}/metrics", timeout=10) as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def free_port() -> int:
    """A TCP port that nobody listens on, nor will take for a connection of its own, as they do those above."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = next(_PORTS)
            probe.bind(("127.0.0.1", port))
            return port


def _follow(node: Node, process: subprocess.Popen[str], was: dict[str, Any] | None) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ready" and node.process is process:
            node.ready = event
        elif event["event"] == "error":
            print(f"  a node says: {event['message']}", file=sys.stderr, flush=True)
