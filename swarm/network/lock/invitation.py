"""An invitation: one word with addresses of a swarm and its key, with which one joins. It is a secret as the key is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from .key import SwarmKey

_PREFIX = "swarm:"
_MAX_CHARS = 4096


@dataclass(frozen=True)
class Invitation:
    """``swarm:ADDRESS,ADDRESS#KEY``.

    Attributes:
        initial_peers: ``/ip4/…/tcp/…/p2p/…``.
        key: None: the swarm is open.
    """

    initial_peers: tuple[str, ...]
    key: SwarmKey | None = None

    def line(self) -> str:
        """As it is given to people."""
        return _PREFIX + ",".join(self.initial_peers) + ("" if self.key is None else f"#{self.key.text()}")


def read_invitation(given: str) -> Invitation:
    """A line, or a file with it.

    Raises:
        UsageError: it is none. The text isn't shown, as there is a key in it.
    """
    line = given.strip()
    if not line.startswith(_PREFIX):
        try:
            line = Path(given).expanduser().read_text()[:_MAX_CHARS].strip()
        except (OSError, ValueError):
            line = ""
    addresses, _, key = line.removeprefix(_PREFIX).partition("#")
    peers = tuple(filter(None, addresses.split(",")))
    if not line.startswith(_PREFIX) or len(line) >= _MAX_CHARS or not _all_addresses(peers):
        raise UsageError("this is no invitation, nor a file with one: swarm-node invite prints it, in one line")
    return Invitation(peers, SwarmKey.parse(key, "the invitation") if key else None)


def _all_addresses(peers: Sequence[str]) -> bool:
    return bool(peers) and all(peer.startswith("/") and "/p2p/" in peer for peer in peers)
