"""Nodes behind NATs serve, and say truly how they are reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.network.lock.key import SwarmKey
from tests.net.lab import Lab
from tests.net.swarms import NetSwarm, last_reached, wait_for
from tests.swarm_e2e.nodes import run_command


@pytest.mark.parametrize(("outside", "options"), [("10.81.0", ()), ("54.81.0", ()), ("10.81.0", ("--relay",))])
def test_a_node_behind_a_nat_serves(
    lab: Lab, swarm: NetSwarm, right: str, outside: str, options: tuple[str, ...]
) -> None:
    """Nobody names a relay; it doesn't matter whether the addresses look public."""
    lan = lab.lan(outside)
    first, second, client = (lab.host(lan) for _ in range(3))
    home = lab.host(lab.nat(lan, "192.168.7"))
    swarm.add(first, None)
    open_node = swarm.add(second, "0:4")
    hidden = swarm.add(home, "4:8", *options)
    open_node.wait_ready()
    hidden.wait_ready()
    made = swarm.generate(client)
    assert made["text"] == right
    assert last_reached(open_node)["how"] == "direct"
    assert last_reached(hidden)["how"] == "relay"
    seen = swarm.status(client)
    assert {name: (node["state"], node["reached"], node["relayed"]) for name, node in seen.items()} == {
        open_node.peer_id: ("online", "direct", False),
        hidden.peer_id: ("online", "hole-punched", True),
    }


def test_nats_on_both_sides(lab: Lab, swarm: NetSwarm, right: str) -> None:
    """Two nodes behind two NATs push to each other through the relay, for a client that is behind one of them."""
    lan = lab.lan("10.82.0")
    first = lab.host(lan)
    home, other = lab.nat(lan, "192.168.7"), lab.nat(lan, "192.168.8")
    swarm.add(first, None)
    nodes = [
        swarm.add(lab.host(home), "0:4", "--metrics-port", "9100"),
        swarm.add(lab.host(other), "4:8"),
    ]
    for node in nodes:
        node.wait_ready()
    assert swarm.generate(lab.host(other))["text"] == right
    assert [last_reached(node)["how"] for node in nodes] == ["relay", "relay"]


def test_a_lock_holds_over_relays(lab: Lab, swarm: NetSwarm, right: str, tmp_path: Path) -> None:
    """PeerIDs are proved from end to end, whoever carries the bytes."""
    file = tmp_path / "swarm.key"
    file.write_text(SwarmKey.new().text())
    swarm.options = ("--swarm-key", str(file))
    client, hidden = swarm.hide(lab, "10.84.0")
    assert swarm.generate(client)["text"] == right
    assert last_reached(hidden)["how"] == "relay"
    locked = run_command(
        ["swarm", "status", "demo", "--once", "--initial-peers", swarm.initial_peers[0]], netns=client.namespace
    )
    assert locked.returncode == 2
    assert "this swarm is locked" in locked.stderr


def test_a_relay_that_restarts_relays_again(lab: Lab, swarm: NetSwarm, right: str, tmp_path: Path) -> None:
    lan = lab.lan("10.83.0")
    first, client = lab.host(lan), lab.host(lan)
    home = lab.nat(lan, "192.168.7")
    key = ("--identity", str(tmp_path / "key"), "--port", "4001")
    relay = swarm.add(first, None, *key)
    hidden = swarm.add(lab.host(home), "0:8")
    hidden.wait_ready()
    assert swarm.generate(client)["text"] == right
    relay.kill()
    wait_for(lambda: last_reached(hidden)["how"] == "unreachable")
    swarm.restart(relay, first)
    wait_for(lambda: last_reached(hidden)["how"] == "relay")
    wait_for(lambda: hidden.peer_id in swarm.status(client))
    assert swarm.generate(client)["text"] == right
