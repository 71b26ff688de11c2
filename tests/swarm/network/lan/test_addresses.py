"""Which addresses are announced, and which of somebody else's are tried first."""

from __future__ import annotations

from ipaddress import ip_interface

import pytest

from swarm.network.lan.addresses import (
    Interface,
    announced,
    by_nearness,
    is_loopback,
    multicast_hosts,
    own_interfaces,
)


def card(name: str, address: str) -> Interface:
    return Interface(name, ip_interface(address))


LO, LO6 = card("lo", "127.0.0.1/8"), card("lo", "::1/128")
HOME, OFFICE = card("wlan0", "192.168.1.5/24"), card("eth0", "10.1.2.3/16")
HOME6, LINK6 = card("wlan0", "fd00::5/64"), card("wlan0", "fe80::5/64")
DOCKER, BRIDGE = card("docker0", "172.17.0.1/16"), card("br-0a1b2c3d4e5f", "172.18.0.1/16")
VPN, TAILSCALE = card("tun0", "10.8.0.2/24"), card("tailscale0", "100.64.0.9/32")
ALL = [LO, LO6, DOCKER, BRIDGE, VPN, TAILSCALE, HOME, OFFICE, HOME6, LINK6]


@pytest.mark.parametrize("one", ALL)
def test_which_are_local_networks(one: Interface) -> None:
    assert one.is_lan == (one in (HOME, OFFICE, HOME6))


def test_bridges_of_virtual_machines_on_the_network_are_local_networks() -> None:
    assert card("br0", "192.168.1.5/24").is_lan


def test_where_to_listen() -> None:
    assert multicast_hosts(ALL) == ("127.0.0.1", "192.168.1.5", "10.1.2.3")


def visible(*interfaces: Interface) -> list[str]:
    return [f"/ip{one.address.version}/{one.address.ip}/tcp/31330/p2p/Qm" for one in interfaces]


def addresses(*interfaces: Interface) -> list[str]:
    return [maddr.removesuffix("/p2p/Qm") for maddr in visible(*interfaces)]


def test_announced_are_those_that_others_can_use() -> None:
    assert announced(visible(*ALL), ALL) == tuple(addresses(HOME, OFFICE, HOME6))
    seen = ["/ip4/203.0.113.9/tcp/4001/p2p/Qm", "/ip4/203.0.113.9/tcp/4001/p2p/QmRelay/p2p-circuit/p2p/Qm"]
    assert announced([*seen, *visible(*ALL)], ALL)[-1] == "/ip4/203.0.113.9/tcp/4001"
    assert announced(visible(LO, DOCKER), ALL) == tuple(addresses(LO))
    assert announced([], ALL) == ()


def test_near_ones_first() -> None:
    theirs = ["/ip4/127.0.0.1/tcp/1", "/ip4/172.17.0.1/tcp/1", "/ip4/10.99.0.1/tcp/1", "/ip4/10.1.9.9/tcp/1"]
    theirs += ["/ip4/203.0.113.9/tcp/1", "/ip4/192.168.1.77/tcp/1", "/ip6/fd00::77/tcp/1"]
    assert by_nearness(theirs, ALL) == [
        ["/ip4/10.1.9.9/tcp/1", "/ip4/192.168.1.77/tcp/1", "/ip6/fd00::77/tcp/1"],
        ["/ip4/10.99.0.1/tcp/1", "/ip4/203.0.113.9/tcp/1"],
        ["/ip4/172.17.0.1/tcp/1"],
        ["/ip4/127.0.0.1/tcp/1"],
    ]
    assert by_nearness(theirs, [])[0] == theirs[1:]
    assert by_nearness(["nonsense"], ALL) == []


def test_this_machine() -> None:
    assert any(one.is_loopback for one in own_interfaces())
    assert [is_loopback(address) for address in addresses(LO, LO6, HOME)] == [True, True, False]
