"""Which addresses of a machine others on its networks can use, and which of another machine's to try first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

import ifaddr

from .record import MAX_ADDRESSES, usable_address

# Bridges to containers and virtual machines on this machine, and tunnels: they lead to no local network.
_VIRTUAL = re.compile(
    r"(docker|br-[0-9a-f]{12}|veth|vethernet|virbr|vnet|vmnet|vboxnet|podman|cni|flannel|cali|lxcbr|lxdbr|incusbr"
    r"|tun|utun|wg|tailscale|ppp|ipsec|nordlynx|proton|awdl|llw|dummy).*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Interface:
    """An address of this machine, on the network card ``name``."""

    name: str
    address: IPv4Interface | IPv6Interface

    @property
    def is_loopback(self) -> bool:
        """It leads to this machine only."""
        return self.address.ip.is_loopback

    @property
    def is_lan(self) -> bool:
        """Other machines may be behind it."""
        point_to_point = self.address.network.num_addresses <= 2
        local = self.is_loopback or self.address.ip.is_link_local
        return not (local or point_to_point or _VIRTUAL.fullmatch(self.name))


def own_interfaces() -> list[Interface]:
    """Those of this machine, now."""
    found = []
    for adapter in ifaddr.get_adapters():
        for one in adapter.ips:
            host = one.ip if isinstance(one.ip, str) else one.ip[0]
            found.append(Interface(adapter.nice_name, ip_interface(f"{host}/{one.network_prefix}")))
    return found


def multicast_hosts(interfaces: Iterable[Interface]) -> tuple[str, ...]:
    """The IPv4 addresses whose networks are asked: local networks and, for others on this machine, loopback."""
    usable = [one for one in interfaces if one.address.version == 4 and (one.is_lan or one.is_loopback)]
    return tuple(dict.fromkeys(str(one.address.ip) for one in usable))


def announced(maddrs: Iterable[str], interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Of a peer's own addresses (``/ip4/…/tcp/…/p2p/…``) those to announce on a local network, without the PeerID. Only
    if there are none, those that are for this machine alone."""
    lan = {one.address.ip for one in interfaces if one.is_lan}
    own = {one.address.ip for one in interfaces}
    found: list[tuple[int, str]] = []
    for maddr in maddrs:
        address = maddr.partition("/p2p/")[0]
        usable = usable_address(address) if "/p2p-circuit" not in maddr else None
        if usable is not None and (usable[0] in lan or usable[0] not in own):
            found.append((usable[0] not in lan, address))  # the others are given by hand, or seen from outside
        elif usable is not None and usable[0].is_loopback:
            found.append((2, address))
    others = [address for kind, address in sorted(found, key=lambda one: one[0]) if kind < 2]
    return tuple(dict.fromkeys(others or [address for _, address in found]))[:MAX_ADDRESSES]


def is_loopback(address: str) -> bool:
    """Whether ``/ip4/…/tcp/…`` leads to this machine only."""
    usable = usable_address(address)
    return usable is not None and usable[0].is_loopback


def by_nearness(addresses: Iterable[str], interfaces: Sequence[Interface]) -> list[list[str]]:
    """Another node's addresses in groups to try one after the other: in a local network of this machine; elsewhere; in
    a network inside this machine, such as docker's, of which every machine has one with the same addresses; this
    machine's loopback."""
    groups: list[list[str]] = [[], [], [], []]
    for address in addresses:
        if (usable := usable_address(address)) is not None:
            ip = usable[0]
            inside = [one for one in interfaces if ip in one.address.network and not one.is_loopback]
            near = 0 if any(one.is_lan for one in inside) else 3 if ip.is_loopback else 2 if inside else 1
            groups[near].append(address)
    return [group for group in groups if group]
