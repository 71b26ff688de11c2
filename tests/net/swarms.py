"""Nodes and commands on the hosts of a lab."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.net.lab import Host, Lab
from tests.swarm_e2e.nodes import Node, run_command

PROMPT = "Return a list of"
TOKENS = 6


class NetSwarm:
    """A swarm that serves the demo model, spread over hosts.

    Attributes:
        options: of every command, such as the swarm's key.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self.options: tuple[str, ...] = ()
        self.nodes: list[Node] = []
        self.initial_peers: list[str] = []

    def add(self, host: Host, blocks: str | None, *options: str) -> Node:
        """Starts a node, or without blocks a bootstrap peer. The first one is whom others join by."""
        what = ["bootstrap"] if blocks is None else ["serve", "demo", "--blocks", blocks]
        joining = [part for peer in self.initial_peers for part in ("--initial-peers", peer)]
        argv = [*what, "--log-format", "json", *joining, *self.options, *options]
        node = Node(argv, self._workdir, host.namespace)
        self.nodes.append(node)
        if not self.initial_peers:
            self.initial_peers = [each for each in node.wait_ready()["maddrs"] if f"/{host.address}/" in each]
        return node

    def hide(self, lab: Lab, network: str) -> tuple[Host, Node]:
        """A relay, and behind a NAT a node with all blocks; a host beside the relay, and that node, which is ready."""
        lan = lab.lan(network)
        first, beside = lab.host(lan), lab.host(lan)
        self.add(first, None)
        hidden = self.add(lab.host(lab.nat(lan, "192.168.7")), "0:8")
        hidden.wait_ready()
        return beside, hidden

    def restart(self, ended: Node, host: Host) -> Node:
        """Starts a node that has ended once more, as it was."""
        node = Node(ended.argv, self._workdir, host.namespace)
        self.nodes.append(node)
        node.wait_ready()
        return node

    def generate(self, host: Host, peer: str | None = None) -> dict[str, Any]:
        """Generates on this host; what the command says, with ``text`` and ``route``."""
        argv = ["swarm", "generate", "demo", "--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--json"]
        argv += ["--initial-peers", peer or self.initial_peers[0], *self.options]
        done = run_command(argv, netns=host.namespace)
        assert done.returncode == 0, (done.stderr, [node.stderr.read_text()[-2000:] for node in self.nodes])
        return dict(json.loads(done.stdout))

    def status(self, host: Host) -> dict[str, dict[str, Any]]:
        """What the command says of each node."""
        argv = ["swarm", "status", "demo", "--json", "--initial-peers", self.initial_peers[0], *self.options]
        done = run_command(argv, netns=host.namespace)
        assert done.returncode == 0, done.stderr
        return {node["peer_id"]: node for node in json.loads(done.stdout)["nodes"]}

    def close(self) -> None:
        """Ends all nodes at once: the lab is taken down behind them."""
        for node in self.nodes:
            node.kill()


def last_reached(node: Node) -> dict[str, Any]:
    """What a node has said last about how it is reached."""
    return [event for event in node.events() if event["event"] == "reached"][-1]


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
