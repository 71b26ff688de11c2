"""What is done to a swarm in use, each fault with a proof that it has happened."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .nodes import Node, Swarm, Zygote, daemon_of

NUM_BLOCKS = 8
STARTS = 3
"""How often a node is started that ends while it starts, as when nobody answers it in time."""


@dataclass(frozen=True)
class Fault:
    """``kind``, and when the damage began and ended, in seconds of the monotonic clock."""

    kind: str
    begin: float
    end: float


class Faults:
    """Faults of all kinds in turns, in an order and of lengths that ``seed`` has given.

    Args:
        callers: processes by name that use the swarm and whose network daemons die too.
        longest: seconds that a node is frozen, or a link bad, at most.

    Attributes:
        past: those that have happened.
        broken: what did not go as it should, such as a node that did not come back.
        repeated: nodes that ended while they started, with what they said, and were started again.
    """

    def __init__(self, swarm: Swarm, callers: Mapping[str, int], seed: int, longest: float) -> None:
        self._swarm, self._callers, self._longest = swarm, callers, longest
        self._chance = random.Random(seed)
        self.past: list[Fault] = []
        self.broken: list[str] = []
        self.repeated: list[str] = []
        self._of_nodes: dict[str, Callable[[Node, random.Random], float]] = {
            "kill -9": self._kill,
            "SIGTERM": self._terminate,
            "frozen (SIGSTOP)": self._freeze,
            "p2pd killed": self._kill_daemon,
            "bootstrap killed": self._kill_bootstrap,
            "link drops all": lambda node, chance: self._slow(node, chance, float("inf")),
            "link 2 s late": lambda node, chance: self._slow(node, chance, 2.0),
            "clock jump": self._jump,
            "other blocks": self._move,
        }
        if any(node.disk for node in swarm.nodes):
            self._of_nodes["disk full"] = self._fill_disk
        self.kinds = [*self._of_nodes, *(f"{name}'s p2pd killed" for name in callers)]
        self._waiting: list[str] = []

    def run(self, until: float) -> None:
        """Lets faults happen until then, and the last of them end. It takes up to three times as long where a slow
        machine needs that for one of each kind."""
        under_way: list[Future[None]] = []
        begun: set[str] = set()
        latest = until + 2 * (until - time.monotonic())
        with ThreadPoolExecutor(len(self._swarm.nodes)) as pool:
            try:
                while (now := time.monotonic()) < until or (len(begun) < len(self.kinds) and now < latest):
                    chosen = self._choose()
                    if chosen is not None:
                        kind, node = chosen
                        begun.add(kind)
                        under_way.append(pool.submit(self._happen, kind, node, random.Random(self._chance.random())))
                    self._pause(self._chance.uniform(2.0, 5.0))
            except BaseException:
                self._swarm.over.set()  # which ends those under way
                raise
        for future in under_way:
            future.result()

    def _choose(self) -> tuple[str, Node | None] | None:
        """The next kind of those that wait whose turn it can be, and its victim, which is busy from now on."""
        if not self._waiting:
            self._waiting = self._chance.sample(self.kinds, len(self.kinds))
        for kind in self._waiting:
            if kind not in self._of_nodes:
                self._waiting.remove(kind)
                return kind, None
            spare = [node for node in self._victims(kind) if node.serves and self._swarm.spare(node, NUM_BLOCKS)]
            if spare:
                self._waiting.remove(kind)
                node = self._chance.choice(spare)
                node.busy = True
                return kind, node
        return None

    def _victims(self, kind: str) -> list[Node]:
        first, *others = self._swarm.nodes
        if kind == "bootstrap killed":
            return [first]
        if kind == "disk full":
            return [node for node in others if node.disk]
        return [node for node in others if not (kind == "other blocks" and node.disk)]

    def _happen(self, kind: str, node: Node | None, chance: random.Random) -> None:
        begin = time.monotonic()
        print(f"{kind}: {node}" if node else kind, flush=True)
        try:
            if node is None:
                end = self._kill_daemon_of_caller(kind)
            else:
                end = self._of_nodes[kind](node, chance)
                self._back(node)
            self.past.append(Fault(kind, begin, end))
        except Exception as error:
            if not self._swarm.over.is_set():
                self.broken.append(f"{kind}, {node}: {type(error).__name__}: {error}")
                print(f"BROKEN: {self.broken[-1]}", flush=True)
                self._revive(node)
        finally:
            if node is not None:
                node.busy = False

    def _back(self, node: Node) -> None:
        """It serves. As a supervisor would, this starts it again if it has ended, also if it ends while it starts."""
        for attempt in range(STARTS):
            if not node.running.alive:
                self._swarm.start(node)
            try:
                node.running.wait_ready()
                return
            except AssertionError:
                if attempt == STARTS - 1 or node.running.alive:
                    raise
                self._note_end(node)

    def _revive(self, node: Node | None) -> None:
        """Others go on without a node that can't be started."""
        with contextlib.suppress(Exception):
            if node is not None:
                self._back(node)

    def _note_end(self, node: Node) -> None:
        self.repeated.append(f"{node}: {node.running.events()[-1].get('message')}")

    def _pause(self, seconds: float) -> float:
        """Waits; the time now."""
        self._swarm.over.wait(seconds)
        return time.monotonic()

    def _kill(self, node: Node, chance: random.Random) -> float:
        node.running.kill()
        end = time.monotonic()
        self._pause(chance.uniform(0.0, 3.0))
        return end

    def _terminate(self, node: Node, chance: random.Random) -> float:
        node.running.terminate()
        node.running.wait_gone(60)
        assert any(event["event"] == "stopped" for event in node.running.events()), node.running.events()[-1]
        end = time.monotonic()
        self._pause(chance.uniform(0.0, 3.0))
        return end

    def _kill_bootstrap(self, node: Node, chance: random.Random) -> float:
        """The peer by which everybody has joined is away for a while; it finds the others by those it has met."""
        node.running.kill()
        end = time.monotonic()
        self._pause(chance.uniform(0.2, 1.0) * min(40.0, self._longest))
        return end

    def _move(self, node: Node, chance: random.Random) -> float:
        """It comes back with other blocks: those that leave the thinnest part of the swarm thickest."""
        node.running.terminate()
        node.running.wait_gone(60)
        end = time.monotonic()
        others = [other.blocks for other in self._swarm.nodes if other is not node]
        spans = sorted({(0, 4), (4, 8), (2, 6), (0, 3), (3, 6), (5, 8)} - {node.blocks}, key=lambda _: chance.random())
        node.blocks = max(spans, key=lambda span: thinnest([*others, span]))
        return end

    def _freeze(self, node: Node, chance: random.Random) -> float:
        pid = node.running.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 10)
            return self._pause(chance.uniform(5.0, max(5.0, min(60.0, self._longest))))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _kill_daemon(self, node: Node, chance: random.Random) -> float:
        """It comes back by itself, which the node's metrics tell."""
        restarts = node.figures()["swarm_daemon_restarts_total"]
        kill_daemon(node.running.pid)
        end = time.monotonic()
        wait_for(lambda: node.figures()["swarm_daemon_restarts_total"] > restarts, 30)
        wait_for(lambda: node.figures()["swarm_daemon_up"], 30)
        return end

    def _kill_daemon_of_caller(self, kind: str) -> float:
        pid = self._callers[kind.partition("'")[0]]
        kill_daemon(pid)
        end = time.monotonic()
        wait_for(lambda: daemon_of(pid), 30)
        return end

    def _slow(self, node: Node, chance: random.Random, delay: float) -> float:
        links, held = self._swarm.links, self._swarm.links.held[node.port]
        links.delay[node.port] = delay
        try:
            self._pause(chance.uniform(5.0, max(5.0, min(20.0, self._longest))))
            wait_for(lambda: links.held[node.port] > held, 60)
            return time.monotonic()
        finally:
            del links.delay[node.port]

    def _jump(self, node: Node, chance: random.Random) -> float:
        """Its machine's clock is wrong by minutes for a while."""
        ahead = chance.choice((-1, 1)) * chance.uniform(30.0, 300.0)
        node.probe.set_clock(ahead)
        try:
            wait_for(lambda: node.probe.clock_ahead() == ahead, 30)
            self._pause(chance.uniform(5.0, max(5.0, min(20.0, self._longest))))
        finally:
            node.probe.set_clock(0.0)
        wait_for(lambda: node.probe.clock_ahead() == 0.0, 30)
        return time.monotonic()

    def _fill_disk(self, node: Node, chance: random.Random) -> float:
        """It has lost its weights, and the disk fills while they come; then there is room again."""
        assert node.disk is not None
        node.running.kill()
        end = time.monotonic()
        for path in node.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._wait_for_weights(node)
        process = node.running
        filler = node.disk / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            process.wait_gone(60)
            said = process.events()[-1]
            assert said["event"] == "error", said
            assert "No space left" in said["message"] or "make room" in said["message"], said
            assert Zygote.wait(process.pid) == 2
        finally:
            filler.unlink()
        return end

    def _wait_for_weights(self, node: Node) -> None:
        """Starts it, until a part of its weights has come."""

        def are_coming() -> bool:
            if not node.running.alive:
                self._note_end(node)
                self._swarm.start(node)
            return any(e["event"] == "progress" and 0 < e["done"] < e["total"] for e in node.running.events())

        self._swarm.start(node)
        wait_for(are_coming, 60)


def thinnest(spans: list[tuple[int, int]]) -> tuple[int, ...]:
    """How many serve each block, the fewest first."""
    return tuple(sorted(sum(start <= block < end for start, end in spans) for block in range(NUM_BLOCKS)))


def kill_daemon(pid: int) -> None:
    """Ends a process's network daemon, which it has or is about to have."""
    wait_for(lambda: daemon_of(pid), 30)
    daemon = daemon_of(pid)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: daemon_of(pid) != daemon, 10)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Waits until something is so.

    Raises:
        TimeoutError: it is not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.1)


@contextmanager
def small_disk(path: Path) -> Iterator[Path | None]:
    """A file system of 8 MB there, where this user may mount one."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
