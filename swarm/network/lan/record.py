"""What a node says of itself by multicast DNS: one TXT record of the service ``_swarm-llm._tcp.local.``

Each of its strings has at most 255 bytes. Anybody on the network can send such records, so they are read with limits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

FORM = "1"  # of the record: others are ignored
MAX_ADDRESSES = 8
_MAX_VERSION, _MAX_NAME, _MAX_MODEL = 40, 60, 200  # bytes in UTF-8
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,60}")
_ADDRESS = re.compile(r"/(ip4|ip6)/([0-9a-fA-F.:]{2,45})/tcp/([0-9]{1,5})")


@dataclass(frozen=True)
class LanRecord:
    """A node that announces itself.

    Attributes:
        swarm: the name of its swarm.
        model: by :func:`model_label`; empty if it serves none.
        version: of its program.
        addresses: ``/ip4/…/tcp/…``, without the PeerID.
    """

    peer_id: str
    swarm: str
    model: str
    version: str
    addresses: tuple[str, ...]

    @property
    def maddrs(self) -> tuple[str, ...]:
        """The addresses with the PeerID."""
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self.addresses)

    def to_txt(self) -> dict[str, str]:
        """The strings of the TXT record, by their keys."""
        txt = {"form": FORM, "peer": self.peer_id, "swarm": self.swarm, "model": self.model, "version": self.version}
        return txt | {f"a{number}": address for number, address in enumerate(self.addresses[:MAX_ADDRESSES])}

    @classmethod
    def from_txt(cls, txt: Mapping[bytes, bytes | None]) -> LanRecord:
        """Reads a stranger's record. Addresses that nobody else can use are left out.

        Raises:
            ValueError: it is none, of another form, or without an address.
        """
        if _text(txt, "form", 8) != FORM:
            raise ValueError("a record of another form")
        peer_id, swarm = _text(txt, "peer", 64), _text(txt, "swarm", _MAX_NAME)
        if not _PEER_ID.fullmatch(peer_id) or not is_swarm_name(swarm):
            raise ValueError("a record names a peer and its swarm")
        given = [_text(txt, f"a{number}", 64) for number in range(MAX_ADDRESSES)]
        addresses = tuple(dict.fromkeys(address for address in given if usable_address(address) is not None))
        if not addresses:
            raise ValueError("a record has an address")
        return cls(peer_id, swarm, _text(txt, "model", _MAX_MODEL), _text(txt, "version", _MAX_VERSION), addresses)


def is_swarm_name(name: str) -> bool:
    """Whether a swarm may be called so."""
    return bool(name) and name.isprintable() and name == name.strip() and len(name.encode()) <= _MAX_NAME


def model_label(prefix: str) -> str:
    """How records name the model ``prefix`` of the DHT: as it is or, if it is long, by a digest."""
    if len(prefix.encode()) <= _MAX_MODEL and prefix.isprintable():
        return prefix
    return "sha256-" + hashlib.sha256(prefix.encode()).hexdigest()


def usable_address(address: str) -> tuple[IPv4Address | IPv6Address, int] | None:
    """IP and TCP port of ``/ip4/…/tcp/…``; ``None``: it has another form, or no other machine can use it (an IPv6
    link-local address is one on each of a machine's networks)."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return None
    kind, host, port = found.groups()
    try:
        ip = IPv4Address(host) if kind == "ip4" else IPv6Address(host)
    except AddressValueError:
        return None
    useless = ip.is_multicast or ip.is_unspecified or ip.is_link_local or (ip.is_reserved and not ip.is_loopback)
    if useless or not 0 < int(port) < 65536:
        return None
    return ip, int(port)


def _text(txt: Mapping[bytes, bytes | None], key: str, most: int) -> str:
    """A string of the record, empty if there is none.

    Raises:
        ValueError: it is no text, or has more than ``most`` bytes.
    """
    value = txt.get(key.encode()) or b""
    if len(value) > most:
        raise ValueError(f"{key} is too long")
    text = value.decode()  # UnicodeDecodeError is a ValueError
    if not text.isprintable():
        raise ValueError(f"{key} is no text")
    return text
