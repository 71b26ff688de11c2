"""How long each peer usually takes for a step: after that it is overdue."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

from hivemind.p2p import PeerID

KEPT = 256  # steps of a peer and a size
_KNOWN = 4  # steps, before anything counts as usual
_PERCENTILE = 0.99
_OVERDUE = 1.5  # times the usual
UNKNOWN_SECONDS = 1.0
"""After which a step is overdue at a peer of which nothing is known yet."""
_PEERS = 1024


class _Samples:
    """The last ones, and the same sorted."""

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        if len(self._order) == KEPT:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(seconds)
        insort(self._sorted, seconds)

    def usual(self) -> float | None:
        if len(self._sorted) < _KNOWN:
            return None
        count = len(self._sorted)
        return self._sorted[min(math.ceil(_PERCENTILE * count), count - 1) - 1]  # one alone is never usual


class StepTimes:
    """Of all sessions of a model in this process. Steps are told apart by size, in powers of two of their tokens."""

    def __init__(self) -> None:
        self._samples: dict[tuple[PeerID, int], _Samples] = {}

    def add(self, peer_id: PeerID, tokens: int, seconds: float) -> None:
        """A step of ``tokens`` (rows × columns) was waited for so long."""
        key = peer_id, tokens.bit_length()
        if key not in self._samples:
            if len(self._samples) == _PEERS:
                self._samples.pop(next(iter(self._samples)))
            self._samples[key] = _Samples()
        self._samples[key].add(seconds)

    def overdue_after(self, peer_id: PeerID, tokens: int) -> float:
        """Seconds after which a step is overdue: 1.5 times the 99th percentile of such steps at this peer."""
        samples = self._samples.get((peer_id, tokens.bit_length()))
        usual = None if samples is None else samples.usual()
        return UNKNOWN_SECONDS if usual is None else _OVERDUE * usual
