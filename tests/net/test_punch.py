"""Who is behind a NAT is reached directly where the NATs permit it."""

from __future__ import annotations

import pytest

from tests.net.lab import Lab
from tests.net.swarms import NetSwarm, last_reached

BYTES = 5_000  # more than attempts to connect, less than a generation


def test_a_node_behind_a_nat_dials_the_client(lab: Lab, swarm: NetSwarm, right: str) -> None:
    client, hidden = swarm.hide(lab, "10.86.0")
    assert swarm.generate(client)["text"] == right
    assert last_reached(hidden)["how"] == "relay"
    assert swarm.status(client)[hidden.peer_id]["reached"] == "hole-punched"


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_client_and_a_node_behind_two_nats(lab: Lab, swarm: NetSwarm, right: str, *, symmetric: bool) -> None:
    """With a NAT whose ports nobody can tell beforehand, the relay remains."""
    lan = lab.lan("10.87.0")
    swarm.add(lab.host(lan), None)
    home, other = lab.nat(lan, "192.168.7", symmetric=symmetric), lab.nat(lan, "192.168.8")
    hidden = swarm.add(lab.host(home), "0:8")
    hidden.wait_ready()
    client = lab.host(other)
    lab.count(other, home)
    assert swarm.generate(client)["text"] == right
    assert (lab.counted(other, home) > BYTES) == (not symmetric)
    assert swarm.status(client)[hidden.peer_id]["reached"] == ("relay" if symmetric else "hole-punched")


def test_nodes_behind_two_nats_push_directly(lab: Lab, swarm: NetSwarm, right: str) -> None:
    lan = lab.lan("10.88.0")
    swarm.add(lab.host(lan), None)
    home, other = lab.nat(lan, "192.168.7"), lab.nat(lan, "192.168.8")
    nodes = [swarm.add(lab.host(home), "0:4"), swarm.add(lab.host(other), "4:8")]
    for node in nodes:
        node.wait_ready()
    lab.count(home, other)
    assert swarm.generate(lab.host(lan))["text"] == right
    assert lab.counted(home, other) > BYTES
