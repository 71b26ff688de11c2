"""Nodes behind NATs serve, and say truly how they are reached."""

from __future__ import annotations

import pytest

from tests.net.lab import Lab
from tests.net.swarms import NetSwarm, last_reached


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
        hidden.peer_id: ("online", "relay", True),
    }
