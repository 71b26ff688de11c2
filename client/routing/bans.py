"""Peers that failed and are left out for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hivemind.p2p import PeerID

MAX_BAN_SECONDS = 60.0
_RESTARTS_BELIEVED = 3  # a node that fails after each is no better than one that doesn't restart


@dataclass(frozen=True)
class _Ban:
    failures: int
    started: float  # when the node came up, by its own clock, which only it may be compared with
    until: float
    reason: str


class Bans:
    """Bans last ``base`` seconds, twice as long each time that a peer fails again when it was let in. Some end as the
    node has restarted."""

    def __init__(self, base: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._base, self._clock = base, clock
        self._bans: dict[PeerID, _Ban] = {}

    def failed(self, peer_id: PeerID, reason: str = "", *, started: float = 0.0, ago: float = 0.0) -> None:
        """Bans a peer that failed ``ago`` seconds before now; ``started`` is when it came up by its own record, 0 if it
        doesn't say."""
        ban, at = self._bans.get(peer_id), self._clock() - ago
        if ban is not None and at <= ban.until and started in (0.0, ban.started):
            return  # each of many sessions meets the failure for which the peer is left out already
        failures = 1 if ban is None else ban.failures + 1
        seconds = min(MAX_BAN_SECONDS, self._base * 2 ** min(failures - 1, 16))
        self._bans[peer_id] = _Ban(failures, started, at + seconds, reason)

    def succeeded(self, peer_id: PeerID) -> None:
        """Forgets a peer's failures."""
        self._bans.pop(peer_id, None)

    def banned(self, peer_id: PeerID, *, started: float = 0.0) -> bool:
        """Whether to leave the peer out; ``started`` as its record says now."""
        return self.why(peer_id, started=started) is not None

    def why(self, peer_id: PeerID, *, started: float = 0.0) -> str | None:
        """Why the peer is left out, and for how long; None if it isn't."""
        ban = self._bans.get(peer_id)
        if ban is None:
            return None
        if started and started != ban.started and ban.failures <= _RESTARTS_BELIEVED:
            self._bans[peer_id] = replace(ban, started=started, until=self._clock())  # it counts if it fails again
            return None
        left = ban.until - self._clock()
        return f"banned for {left:.0f} s more after: {ban.reason or 'a failure'}" if left > 0 else None
