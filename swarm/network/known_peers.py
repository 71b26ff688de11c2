"""Which peers a peer knows, and whom of them it asks next whether they are there. Kept on disk, so that a swarm opens
through any of them when the first one is gone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hivemind.utils.multiaddr import Multiaddr

from ..wire.peer_id import read_peer_id

logger = logging.getLogger(__name__)
MAX_CONTACTS = 64
MAX_ADDRESSES = 8  # of a peer
FORGET_SECONDS = 30 * 86400.0
_MAX_BYTES = 1 << 20
_FIRST_PAUSE, _PAUSE_ALONE, _PAUSE = 1.0, 5.0, 60.0
_WRITE_SECONDS = 3600.0  # a file that is right but for the times is as old as this at most


@dataclass(frozen=True)
class Contact:
    """A peer and where it was reached.

    Attributes:
        peer_id: in base 58.
        addresses: multiaddresses without the part ``/p2p/…``.
        seen: when it was last there, in seconds since the epoch; 0: never yet.
    """

    peer_id: str
    addresses: tuple[str, ...]
    seen: float = 0.0


@dataclass(frozen=True)
class Asked:
    """When a peer was asked last, in seconds of any clock, and how often it has not answered since it last did."""

    at: float
    failures: int = 0


def whom_to_ask(
    contacts: Iterable[str], present: Iterable[str], asked: Mapping[str, Asked], now: float, *, most: int
) -> list[str]:
    """The peers whose turn it is: who is missing after a pause that grows, who is ``present`` once a minute."""
    there = set(present)

    def due(peer_id: str) -> float:
        last = asked.get(peer_id)
        if last is None:
            return 0.0
        if peer_id in there:
            return last.at + _PAUSE
        longest = _PAUSE if there else _PAUSE_ALONE
        return last.at + min(longest, _FIRST_PAUSE * 2 ** min(last.failures, 10))

    return sorted((peer_id for peer_id in contacts if due(peer_id) <= now), key=due)[:most]


def freshest(contacts: Iterable[Contact], now: float, *, most: int = MAX_CONTACTS) -> list[Contact]:
    """At most so many contacts: those seen last, none that has been away for a month."""
    recent = (contact for contact in contacts if contact.seen > now - FORGET_SECONDS)
    return sorted(recent, key=lambda contact: -contact.seen)[:most]


def parse_address(address: str) -> Contact:
    """A contact from a full multiaddress ``/…/p2p/…``, which is well formed."""
    before, _, peer_id = address.rpartition("/p2p/")
    return Contact(peer_id.strip("/"), (before,))


class KnownPeers:
    """The initial peers, for good, and those met.

    Args:
        file: where they are kept; without one they are forgotten with the process.
    """

    def __init__(self, initial_peers: Sequence[str], file: Path | None) -> None:
        self._file = file
        self._initial: dict[str, Contact] = {}
        for address in initial_peers:
            contact = parse_address(address)
            known = self._initial.get(contact.peer_id, Contact(contact.peer_id, ()))
            self._initial[contact.peer_id] = Contact(contact.peer_id, (*known.addresses, *contact.addresses))
        self._met = {contact.peer_id: contact for contact in _read(file, self._initial.keys())}
        self._written: dict[str, Contact] = {}

    def peer_ids(self) -> list[str]:
        """All of them, in base 58."""
        return [*{**self._initial, **self._met}]

    def addresses(self, peer_id: str) -> list[str]:
        """Where a peer may be reached: as it was given, and as it was met. Without the part ``/p2p/…``."""
        contacts = (self._initial.get(peer_id), self._met.get(peer_id))
        return [*{address: None for contact in contacts if contact for address in contact.addresses}]

    def full_addresses(self) -> list[str]:
        """All addresses of all peers, as ``--initial-peers`` takes them."""
        return [f"{address}/p2p/{peer_id}" for peer_id in self.peer_ids() for address in self.addresses(peer_id)]

    def met(self, contacts: Iterable[Contact], now: float) -> None:
        """Peers that are there now, at the time ``now`` in seconds since the epoch."""
        for contact in contacts:
            addresses = contact.addresses[:MAX_ADDRESSES] or self._met.get(contact.peer_id, contact).addresses
            if addresses:
                self._met[contact.peer_id] = Contact(contact.peer_id, addresses, now)
        self._met = {contact.peer_id: contact for contact in freshest(self._met.values(), now)}

    def save(self, *, at_last: bool = False) -> None:
        """Writes the file if that is worth it. A disk that is full is no reason to stop."""
        if self._file is None or not self._met or not (at_last or self._differs()):
            return
        written = dict(self._met)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            met = [asdict(contact) for contact in written.values()]
            partial.write_text(json.dumps({"initial": [*self._initial], "met": met}, indent=1))
            partial.replace(self._file)
        except OSError as error:
            logger.info("could not write the known peers to %s: %s", self._file, error)
            partial.unlink(missing_ok=True)
            return
        self._written = written

    def _differs(self) -> bool:
        if self._met.keys() != self._written.keys():
            return True
        pairs = [(contact, self._written[peer_id]) for peer_id, contact in self._met.items()]
        return any(new.addresses != old.addresses or abs(new.seen - old.seen) > _WRITE_SECONDS for new, old in pairs)


def same_swarm(given: Collection[str], initial: Collection[str], met: Collection[str]) -> bool:
    """Whether a peer that is ``given`` these initial peers (PeerIDs) is to join the swarm that it was in when it had
    others and had ``met`` more. Private swarms must not grow together over a peer that went from one to the other."""
    return not {*given}.isdisjoint({*initial, *met}) or not (given or initial)


def _read(file: Path | None, initial: Collection[str]) -> list[Contact]:
    """The contacts in a file that may have been damaged: what can't be used is left out."""
    if file is None:
        return []
    try:
        with file.open("rb") as stream:
            written = json.loads(stream.read(_MAX_BYTES))
        contacts = [contact for contact in map(_contact, written["met"]) if contact is not None][:MAX_CONTACTS]
        then = list(map(str, written["initial"]))
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return contacts if same_swarm(initial, then, [contact.peer_id for contact in contacts]) else []


def _contact(entry: object) -> Contact | None:
    try:
        peer_id, addresses, seen = entry["peer_id"], entry["addresses"], entry["seen"]  # type: ignore[index]
        read_peer_id(peer_id)
        contact = Contact(peer_id, tuple(str(Multiaddr(address)) for address in addresses[:MAX_ADDRESSES]), float(seen))
    except Exception:  # hivemind's parsers raise what they like
        return None
    return contact if contact.addresses else None
