"""A private swarm on this machine: ``swarm-node serve`` processes on loopback that end with their owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.errors import SwarmError

_COMMAND = (sys.executable, "-c", "from swarm.node.cli import main; main()", "serve")


@dataclass
class LocalNode:
    """A ``swarm-node serve`` process. ``ready`` is its ready event, once it has come."""

    blocks: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people: blocks and process."""
        return f"node {self.blocks} (pid {self.process.pid})"


class LocalSwarm:
    """The processes; all of them end with the ``with``. Logs are written to ``workdir``."""

    def __init__(self, model: str, workdir: Path) -> None:
        self._model, self._workdir = model, workdir
        self.nodes: list[LocalNode] = []
        self.peers: list[str] = []

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *exception: object) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.process.wait(timeout=12)
            except subprocess.TimeoutExpired:
                node.process.kill()

    def start(self, blocks: str, *, name: str) -> LocalNode:
        """Starts a node; the first one, once it is waited for, is the swarm that the others join."""
        command = [*_COMMAND, self._model, "--blocks", blocks]
        command += ["--host", "127.0.0.1", "--log-format", "json", "--name", name]
        for peer in self.peers:
            command += ["--initial-peers", peer]
        # without the settings that the environment may have for other nodes, such as a fixed port
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SWARM_")}
        with (self._workdir / f"{name}.log").open("w") as log:
            # a session of its own, so that Ctrl-C comes to the owner alone, which ends the nodes in order
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
            )
        node = LocalNode(blocks, process)
        self.nodes.append(node)
        threading.Thread(target=_follow, args=(node,), daemon=True).start()
        return node

    def wait(self, nodes: list[LocalNode], timeout: float = 120.0) -> None:
        """Waits until the nodes serve.

        Raises:
            SwarmError: one of them did not start.
        """
        deadline = time.monotonic() + timeout
        for node in nodes:
            while node.ready is None:
                if node.process.poll() is not None or time.monotonic() > deadline:
                    why = "; ".join(node.errors) or f"see {self._workdir}"
                    raise SwarmError(f"{node.name} did not start: {why}")
                time.sleep(0.05)
            if not self.peers:
                self.peers = node.ready["maddrs"][:1]


def _follow(node: LocalNode) -> None:
    assert node.process.stdout is not None
    for line in node.process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            node.ready = event
        elif event["event"] == "error":
            node.errors.append(event["message"])
