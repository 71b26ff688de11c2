"""Commands of ``swarm-node`` that give and get weights, as on machines of their own, and what they have said."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.swarm_e2e.nodes import Node, run_to_end

HERE = ("--host", "127.0.0.1", "--log-format", "json")
NAME = "weights-hf"


class Processes:
    """Commands of ``swarm-node``, each with a cache of its own, as on machines of their own."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.nodes: list[Node] = []
        self.peers: list[str] = []

    def argv(self, *argv: str) -> list[str]:
        cache = self.workdir / f"cache-{len(list(self.workdir.glob('cache-*')))}"
        cache.mkdir()
        self.cache = cache
        joining = [part for peer in self.peers for part in ("--initial-peers", peer)]
        return [*argv, "--cache-dir", str(cache), *HERE, *joining]

    def start(self, *argv: str) -> Node:
        node = Node(self.argv(*argv), self.workdir)
        self.nodes.append(node)
        return node

    def seed(self, model: Path, *options: str) -> Node:
        node = self.start("seed", str(model), "--dht-prefix", NAME, *options)
        self.peers = self.peers or node.wait_ready()["maddrs"][:1]
        return node

    def run(self, *argv: str) -> tuple[int, list[dict[str, Any]], str]:
        return run_to_end(self.argv(*argv), self.workdir)

    def close(self) -> None:
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait_gone(15)


def wait_until(condition: Callable[[], object], node: Node, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (node.stdout.read_text(), node.stderr.read_text()[-3000:])
        time.sleep(0.02)


def last(node: Node, name: str) -> dict[str, Any] | None:
    return next((event for event in reversed(node.events()) if event["event"] == name), None)


def part_done(node: Node) -> float:
    """How much of the weights is here, 0 to 1."""
    found = [e for e in node.events() if e["event"] == "progress" and "weights" in e["message"] and e["done"]]
    return found[-1]["done"] / found[-1]["total"] if found else 0.0


def wait_done(node: Node) -> dict[str, Any]:
    wait_until(lambda: not node.alive, node)
    found = last(node, "done")
    assert found is not None, (node.stdout.read_text(), node.stderr.read_text()[-3000:])
    return found


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir() if path.is_file())
    assert names == sorted(path.name for path in second.iterdir() if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
