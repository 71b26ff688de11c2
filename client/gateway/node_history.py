"""What each node did in the last ten minutes, in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.network.overview import Meter, Overview, rates

COLUMNS = ("time", "decode", "prefill", "busy", "sessions", "waiting", "cache_used", "rtt_ms")
"""Unix seconds; tokens a second; shares of the time and of the KV cache (0 to 1); numbers; milliseconds."""
KEPT_SECONDS = 600.0
STEP_SECONDS = 5.0
Point = tuple[float, ...]


@dataclass
class _Track:
    since: Meter  # the next point's rates are from here on
    seen: float
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=int(KEPT_SECONDS / STEP_SECONDS)))


class NodeHistory:
    """A point for each node every five seconds, its rates being the mean since the point before."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}

    def add(self, now: float, overview: Overview) -> None:
        """Notes what was seen at ``now`` (Unix seconds)."""
        for node in overview.nodes:
            if node.meter is not None:
                track = self._tracks.setdefault(node.peer_id, _Track(node.meter, now))
                track.seen = now
                _add(track, now, node.meter)
        for peer_id in [peer for peer, track in self._tracks.items() if track.seen < now - KEPT_SECONDS]:
            del self._tracks[peer_id]

    def points(self, peer_id: str) -> Sequence[Point] | None:
        """The points of a node, oldest first, each as :data:`COLUMNS` says; None for a node not seen lately."""
        track = self._tracks.get(peer_id)
        return None if track is None else tuple(track.points)


def _add(track: _Track, now: float, meter: Meter) -> None:
    if meter.busy_s < track.since.busy_s:  # the node was started anew
        track.since = meter
    rate = rates(track.since, meter)
    if rate is None or meter.at - track.since.at < STEP_SECONDS:
        return
    track.since = meter
    used = 1 - meter.cache_tokens_free / max(1, meter.cache_tokens)
    load = (meter.sessions, meter.waiting, round(used, 4), round(meter.rtt * 1e3, 2))
    track.points.append((round(now, 1), round(rate.decode, 2), round(rate.prefill, 2), round(rate.busy, 4), *load))
