"""Weights from peers over slow links: one seeder, three leechers, each with an uplink of 100 Mbit/s.

    python scripts/bench_weights.py                # some 100 MB; prints a markdown table
    python scripts/bench_weights.py --megabytes 50 --mbit 50

All on loopback, with the real commands. In front of each node's announced address there is a small proxy, which passes
on what a node sends at that node's rate, whichever side has opened the connection: the cap is per node, not per
connection. Compared with the time in which the seeder could send everything three times.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.compute.openmp import set_waiting

set_waiting()
os.environ["OMP_NUM_THREADS"] = "1"

from make_checkpoint import make_checkpoint, make_config

import swarm.node.cli
import swarm.node.commands.weights
from swarm.network.peer import Peer, PeerOptions
from swarm.weights.sharing.holders import Holder, announce_holder
from swarm.weights.sharing.manifest import make_manifest
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore

CHUNK = 32 << 10
LATE_SECONDS = 0.05
NAME = "bench"


def fork(work: Callable[[], object], output: Path) -> int:
    """Runs ``work`` in a process of its own; its PID."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(os.open(output.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        try:
            work()
        finally:
            os._exit(70)
    return pid


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Uplink:
    """What one node sends, over all of its connections."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, 0.0

    async def wait(self, count: int) -> None:
        now = time.monotonic()
        # Who wakes up late may catch up, or the node would never reach its rate.
        self._free_at = max(self._free_at, now - LATE_SECONDS) + count / self._rate
        await asyncio.sleep(self._free_at - now)


async def run_proxies(ports: Sequence[tuple[int, int]], rate: float) -> None:
    """For each node a proxy: ``(its port, the node's port)``."""
    uplinks = {node: Uplink(rate) for _, node in ports}

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, uplink: Uplink) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await uplink.wait(len(data))
                writer.write(data)
                await writer.drain()
        writer.close()

    def serve(node: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            dialer = node_of_port(writer.get_extra_info("peername")[1], list(uplinks))
            try:
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", node, limit=CHUNK)
            except OSError:
                writer.close()
                return
            await asyncio.gather(pipe(reader, there_writer, uplinks[dialer]), pipe(there_reader, writer, uplinks[node]))

        return handle

    servers = [await asyncio.start_server(serve(node), "127.0.0.1", port, limit=CHUNK) for port, node in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def node_of_port(port: int, nodes: Sequence[int]) -> int:
    """The node (by the port that it listens on) whose process has opened a connection from ``port``."""
    if port in nodes:  # libp2p likes to dial from the port on which it listens
        return port
    owners = sockets_of_daemons()
    daemon = owners[inode_of(port, listening=False)]
    return next(node for node in nodes if owners.get(inode_of(node, listening=True)) == daemon)


def inode_of(port: int, *, listening: bool) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and (fields[3] == "0A") == listening:
            return fields[9]
    return ""


def sockets_of_daemons() -> dict[str, int]:
    """By the inode of each socket, the PID of the libp2p daemon that has it."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == "p2pd":
                for link in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = os.readlink(link)
                        if target.startswith("socket:["):
                            found[target[8:-1]] = int(process.name)
    return found


class LyingStore(WeightStore):
    """Has everything, and sends something else."""

    def read(self, piece: int) -> bytes | None:
        data = super().read(piece)
        return data and bytes([data[0] ^ 1]) + data[1:]


@dataclass
class Node:
    """A process with an uplink."""

    pid: int
    output: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait(self, name: str, seconds: float = 180.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not (found := self.events(name)):
            if time.monotonic() > deadline:
                raise SystemExit(f"no {name}: {self.output.read_text()} {self.output.with_suffix('.err').read_text()}")
            time.sleep(0.02)
        return found[0]

    def done(self) -> float:
        """How much of the weights is here, 0 to 1."""
        found = [event for event in self.events("progress") if "weights" in event["message"]]
        return found[-1]["done"] / found[-1]["total"] if found and found[-1]["done"] else 0.0

    def end(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        os.waitpid(self.pid, 0)


class Run:
    """A swarm of at most six nodes."""

    def __init__(self, model: Path, workdir: Path, rate: float) -> None:
        self.model, self.workdir = model, workdir
        ports = free_ports(12)
        self._ports = list(zip(ports[:6], ports[6:], strict=True))
        self._unused = list(self._ports)
        self._proxies = fork(lambda: asyncio.run(run_proxies(self._ports, rate)), workdir / "proxies.out")
        self._join: list[str] = []

    def seed(self) -> Node:
        node = self._start("seed", str(self.model), "--dht-prefix", NAME)
        address = node.wait("ready")["maddrs"][0]
        self._join = self._join or ["--initial-peers", address]
        return node

    def fetch(self, number: int) -> Node:
        return self._start("fetch", NAME, "--to", str(self.workdir / str(number)))

    def lie(self) -> Node:
        outer, inner = self._unused.pop()
        announce = f"/ip4/127.0.0.1/tcp/{outer}"

        async def run() -> None:
            options = PeerOptions(self._join[1:], host="127.0.0.1", port=inner, announce=[announce])
            peer = await Peer.start(options)
            store = LyingStore(self.model, make_manifest(self.model))
            await Seeder(peer.p2p, store).register()
            await announce_holder(peer.dht, NAME, Holder(store.manifest.root, (), True), ttl=600)
            print(json.dumps({"event": "ready"}), flush=True)
            await asyncio.Event().wait()

        node = Node(fork(lambda: asyncio.run(run()), self.workdir / "liar.out"), self.workdir / "liar.out")
        node.wait("ready")
        return node

    def _start(self, *argv: str) -> Node:
        outer, inner = self._unused.pop()
        output = self.workdir / f"{inner}.out"
        network = ["--host", "127.0.0.1", "--port", str(inner), "--announce", f"/ip4/127.0.0.1/tcp/{outer}"]
        cache = ["--cache-dir", str(self.workdir / "cache"), "--log-format", "json"]

        def work() -> None:
            import sys

            sys.argv = ["swarm-node", *argv, *network, *cache, *self._join]
            swarm.node.cli.main()

        return Node(fork(work, output), output)

    def close(self) -> None:
        os.kill(self._proxies, signal.SIGKILL)
        os.waitpid(self._proxies, 0)

    def check(self, copies: int) -> None:
        """Raises SystemExit if a byte is wrong."""
        for number in range(copies):
            for file in self.model.iterdir():
                if file.read_bytes() != (self.workdir / str(number) / file.name).read_bytes():
                    raise SystemExit(f"{file.name} is wrong in copy {number}")


def measure(model: Path, rate: float, *, leechers: int, seeders: int = 1, liar: bool = False) -> tuple[float, float]:
    """Seconds until all leechers have everything, and bytes that the first seeder has sent. Of two seeders the first
    is killed when a leecher has half."""
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as workdir:
        run = Run(model, Path(workdir), rate)
        time.sleep(0.5)
        holders = [run.seed() for _ in range(seeders)] + ([run.lie()] if liar else [])
        nodes = [run.fetch(number) for number in range(leechers)]
        begin = min(node.wait("sharing")["time"] for node in nodes)
        if seeders > 1:
            while max(node.done() for node in nodes) < 0.5:
                time.sleep(0.05)
            holders[0].end(signal.SIGKILL)
        end = max(node.wait("done")["time"] for node in nodes)
        for node in nodes:
            node.end()
        for node in holders[1 if seeders > 1 else 0 :]:
            node.end(signal.SIGKILL if liar and node is holders[-1] else signal.SIGTERM)
        sent = holders[0].events("sent")
        run.check(leechers)
        run.close()
        return end - begin, sent[0]["bytes"] if sent else 0


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the checkpoint, about.")] = 100,
    mbit: Annotated[float, typer.Option(help="Uplink of each node in Mbit/s.")] = 100.0,
) -> None:
    """Prints a markdown table."""
    rate = mbit * 1e6 / 8
    with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
        layers = max(1, round(megabytes / 9.2))
        config = make_config("llama-gqa", hidden=512, layers=layers, intermediate=1024)
        model = make_checkpoint(Path(folder) / "model", config, max_shard_bytes=20 << 20)
        size = sum(file.stat().st_size for file in model.iterdir())
        once = size / rate
        print(f"{size / 1e6:.1f} MB, {mbit:.0f} Mbit/s: sent once in {once:.2f} s; load {os.getloadavg()[0]:.1f}\n")
        print(
            "| swarm | seconds | of the time to send it three times | sent by the seeder |\n| --- | --- | --- | --- |"
        )
        for title, options in (
            ("one seeder, one leecher", {"leechers": 1}),
            ("one seeder, three leechers", {"leechers": 3}),
            ("two seeders, one killed when half is there, three leechers", {"leechers": 3, "seeders": 2}),
            ("one seeder, three leechers, one liar that has everything", {"leechers": 3, "liar": True}),
        ):
            seconds, sent = measure(model, rate, **options)  # type: ignore[arg-type]
            times = f"{sent / size:.2f} ×" if sent else "(killed)"
            print(f"| {title} | {seconds:.2f} | {seconds / (3 * once):.2f} | {times} |", flush=True)
        print(f"\nload {os.getloadavg()[0]:.1f} at the end; every copy was compared byte by byte")


if __name__ == "__main__":
    typer.run(main)
