"""Who can be reached as it is, and knows it."""

from __future__ import annotations

from tests.net.lab import Lab
from tests.net.swarms import NetSwarm, last_reached, wait_for


def test_a_plain_lan(lab: Lab, swarm: NetSwarm, right: str) -> None:
    """The first node has nobody to ask, and asks when somebody comes."""
    lan = lab.lan("192.168.1")
    first = swarm.add(lab.host(lan), "0:4")
    assert all(event["event"] != "reached" or event["how"] == "unknown" for event in first.events())
    second = swarm.add(lab.host(lan), "4:8")
    second.wait_ready()
    assert swarm.generate(lab.host(lan))["text"] == right
    assert last_reached(second)["how"] == "direct"
    wait_for(lambda: last_reached(first)["how"] == "direct")


def test_a_client_behind_a_nat(lab: Lab, swarm: NetSwarm, right: str) -> None:
    lan = lab.lan("10.84.0")
    swarm.add(lab.host(lan), "0:8")
    assert swarm.generate(lab.host(lab.nat(lan, "192.168.7")))["text"] == right


def test_two_networks_on_one_machine(lab: Lab, swarm: NetSwarm, right: str) -> None:
    """Both reach it, each by the address that it has there."""
    office, lab_net = lab.lan("10.85.0"), lab.lan("172.20.5")
    both = lab.host(office, lab_net)
    addresses = swarm.add(both, "0:8").wait_ready()["maddrs"]
    for number, lan in enumerate((office, lab_net)):
        here = next(each for each in addresses if f"/{both.addresses[number]}/" in each)
        assert swarm.generate(lab.host(lan), here)["text"] == right
