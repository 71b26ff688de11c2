"""Real nodes on loopback for end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

START_TIMEOUT = 120.0


class Zygote:
    """The process that forks nodes; see :mod:`tests.swarm_e2e.zygote`."""

    module = "tests.swarm_e2e.zygote"
    _process: subprocess.Popen[str] | None = None

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        stdout: Path | None,
        stderr: Path,
        stdin: Path = Path(os.devnull),
        env: Mapping[str, str] = MappingProxyType({}),
        netns: str | None = None,
    ) -> int:
        """Starts a command; its PID. Without ``stdout``, nobody reads what it writes there. ``netns``: the network
        namespace that it runs in."""
        files = {"stdin": str(stdin), "stdout": None if stdout is None else str(stdout), "stderr": str(stderr)}
        return cls._ask({"argv": [*argv], **files, "env": {**env}, "netns": netns})

    @classmethod
    def wait(cls, pid: int) -> int:
        """Waits for a process to end; its exit code."""
        return cls._ask({"wait": pid})

    @classmethod
    def _ask(cls, order: dict[str, Any]) -> int:
        if cls._process is None:
            # one thread a node: they are many, on few cores
            # and the Hub, which is not there, is not asked: its library would try for twenty seconds
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            cls._process = subprocess.Popen(
                [sys.executable, "-m", cls.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[2],
            )
        assert cls._process.stdin is not None
        assert cls._process.stdout is not None
        cls._process.stdin.write(json.dumps(order) + "\n")
        cls._process.stdin.flush()
        return int(cls._process.stdout.readline())

    @classmethod
    def close(cls) -> None:
        """Ends the zygote; nodes are not affected."""
        if cls._process is not None:
            assert cls._process.stdin is not None
            cls._process.stdin.close()
            cls._process.wait()
            cls._process = None


class Node:
    """A ``swarm-node serve`` process."""

    def __init__(
        self,
        argv: Sequence[str],
        workdir: Path,
        netns: str | None = None,
        zygote: type[Zygote] = Zygote,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        number = len(list(workdir.glob("*.out")))
        self.stdout, self.stderr = workdir / f"{number}.out", workdir / f"{number}.err"
        self.stdout.touch()
        self.argv = list(argv)
        self.pid = zygote.start(["swarm-node", *self.argv], self.stdout, self.stderr, env=env, netns=netns)

    def events(self) -> list[dict[str, Any]]:
        """What it has said so far: every line of it is JSON."""
        return [json.loads(line) for line in self.stdout.read_text().splitlines(keepends=True) if line.endswith("\n")]

    @property
    def ready(self) -> dict[str, Any] | None:
        """Its ready event, if it has come."""
        return next((event for event in self.events() if event["event"] == "ready"), None)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    @property
    def peer_id(self) -> str:
        """Its name in the swarm."""
        return self.wait_ready()["peer_id"]

    @property
    def figures(self) -> dict[str, float]:
        """Its metrics, if it has ``--metrics-port``."""
        return figures(f"http://127.0.0.1:{self.argv[self.argv.index('--metrics-port') + 1]}/metrics")

    def wait_ready(self) -> dict[str, Any]:
        """Waits until it serves."""
        deadline = time.monotonic() + START_TIMEOUT
        while (ready := self.ready) is None:
            if not self.alive or time.monotonic() > deadline:
                raise AssertionError(
                    f"no node: {self.argv}\n{self.stdout.read_text()}\n{self.stderr.read_text()[-3000:]}"
                )
            time.sleep(0.05)
        return ready

    def kill(self) -> None:
        """kill -9."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait_gone(60)

    def terminate(self) -> None:
        """SIGTERM, as a supervisor sends it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait_gone(self, timeout: float) -> None:
        """Waits for the process to end."""
        deadline = time.monotonic() + timeout
        while self.alive:
            if time.monotonic() > deadline:
                raise AssertionError(f"node {self.pid} did not end\n{self.stderr.read_text()[-3000:]}")
            time.sleep(0.02)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def figures(address: str) -> dict[str, float]:
    """The metrics at this URL, by their names with labels."""
    with urllib.request.urlopen(address) as reply:
        text = reply.read().decode()
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def run_to_end(argv: Sequence[str], workdir: Path) -> tuple[int, list[dict[str, Any]], str]:
    """Runs a node that is expected to end by itself: exit code, events, and what it wrote to stderr."""
    node = Node(argv, workdir)
    code = Zygote.wait(node.pid)
    return code, node.events(), node.stderr.read_text()


def run_command(
    argv: Sequence[str],
    *,
    said: str | bytes = "",
    read: bool = True,
    env: Mapping[str, str] = MappingProxyType({}),
    netns: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``swarm`` or ``swarm-node`` to its end, with ``said`` on its standard input. Its standard output is
    ``read``, or a pipe whose reader has left."""
    with tempfile.TemporaryDirectory(prefix="swarm-command-") as folder:
        stdin, stdout, stderr = (Path(folder, name) for name in ("in", "out", "err"))
        stdin.write_bytes(said if isinstance(said, bytes) else said.encode())
        stdout.touch()
        code = Zygote.wait(Zygote.start(argv, stdout if read else None, stderr, stdin, env, netns))
        return subprocess.CompletedProcess([*argv], code, stdout.read_text(), stderr.read_text())


class Swarm:
    """Nodes that serve one model to one another's clients, each with metrics if so wished."""

    def __init__(self, model: Path | str, workdir: Path, *, metrics: bool = False) -> None:
        self.model, self._workdir, self._metrics = str(model), workdir, metrics
        self.nodes: list[Node] = []
        self._given: dict[int, tuple[str, ...]] = {}
        self.initial_peers: list[str] = []

    def add(self, blocks: str, *options: str, wait: bool = True) -> Node:
        """Starts a node for these blocks. The first one is the swarm."""
        argv = ["serve", self.model, "--blocks", blocks, "--host", "127.0.0.1", "--log-format", "json", *options]
        if self._metrics:
            argv += ["--metrics-port", str(free_port())]
        for peer in self.initial_peers:
            argv += ["--initial-peers", peer]
        node = Node(argv, self._workdir)
        self.nodes.append(node)
        self._given[node.pid] = (blocks, *options)
        if not self.initial_peers:
            self.initial_peers = node.wait_ready()["maddrs"][:1]
        elif wait:
            node.wait_ready()
        return node

    def node_of(self, peer_id: object) -> Node:
        """The node with this PeerID."""
        return next(node for node in self.nodes if node.alive and node.peer_id == str(peer_id))

    def revive(self) -> Swarm:
        """Starts another node in the place of each that has ended; the swarm itself. At least one must be alive."""
        ended = [node for node in self.nodes if not node.alive]
        self.nodes = [node for node in self.nodes if node.alive]
        self.initial_peers = self.nodes[0].wait_ready()["maddrs"][:1]
        for node in ended:
            self.add(*self._given[node.pid], wait=False)
        for node in self.nodes:
            node.wait_ready()
        return self

    def close(self) -> None:
        """Ends all nodes in order."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            try:
                node.wait_gone(60)
            except AssertionError:
                node.kill()
                raise


@contextlib.contextmanager
def run_swarm(model: Path | str, spans: Sequence[str], *options: str, metrics: bool = False) -> Iterator[Swarm]:
    """A swarm with a node for each of ``spans``, all of them up."""
    with tempfile.TemporaryDirectory(prefix="swarm-e2e-") as workdir:
        swarm = Swarm(model, Path(workdir), metrics=metrics)
        try:
            for span in spans:
                swarm.add(span, *options, wait=False)
            for node in swarm.nodes:
                node.wait_ready()
            yield swarm
        finally:
            swarm.close()
