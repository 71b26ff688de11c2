"""When a session leaves a node that works, but has become slower than another way would be. Nothing here waits.

A node's slowdown is how many times as long it takes for a decode step as its record claims, without the network.
Records are measured while a node starts, so on a busy machine all of them are too good. A hop is suspected while its
slowdown is well above what is known to be possible; after :data:`WINDOW` such steps on end, another way is looked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hivemind.p2p import PeerID

from .left_out import Needs
from .route import Claim, Leg, fill_seconds

WINDOW = 16  # decode steps
MOST_COLUMNS = 8  # of a decode step
SLOWER = 1.5  # times as slow as another way
_RECENT_SECONDS = 60.0
_REMEMBERED = 256  # steps
_UNLIKE = 2.0  # by so much may records of unlike nodes be wrong, compared with each other
_COOLDOWN_SECONDS = 30.0
_MOVE_SECONDS = 0.5  # at least
_PATIENCE = 10.0  # times what a move should cost
_KEPT = 4096

Size = tuple[int, int]


class Asked(Protocol):
    """A hop: a peer that does the blocks ``start:end``."""

    peer_id: PeerID
    start: int
    end: int


H = TypeVar("H", bound=Asked)


def size_of(tokens: int, position: int) -> Size:
    """Decode steps that can be compared: of so many tokens (rows × columns), behind so many columns."""
    return tokens.bit_length(), max(position, 1024).bit_length()


class Slowdowns:
    """The slowdowns of peers, by the sizes of steps. Of all sessions of a model in this process."""

    def __init__(self) -> None:
        self._known: dict[tuple[PeerID, Size], tuple[float, float]] = {}

    def note(self, peer_id: PeerID, size: Size, slowdown: float, now: float) -> None:
        """``slowdown`` was measured at ``now``."""
        self._known.pop((peer_id, size), None)  # so that the oldest is the first
        if len(self._known) == _KEPT:
            del self._known[next(iter(self._known))]
        self._known[peer_id, size] = slowdown, now

    def possible(self, size: Size, now: float, best: float) -> float:
        """What to expect of a peer that was not measured lately, if a peer like it has had ``best``."""
        others = [
            slowdown
            for (_, known), (slowdown, at) in self._known.items()
            if known == size and now - at < _RECENT_SECONDS
        ]
        return max(1.0, min(best, _UNLIKE * min(others, default=best)))

    def expected(self, peer_id: PeerID, size: Size, now: float, best: float) -> float:
        """What to expect of a peer: its own slowdown, if that was measured lately."""
        slowdown, at = self._known.get((peer_id, size), (0.0, -_RECENT_SECONDS))
        return max(1.0, slowdown) if slowdown and now - at < _RECENT_SECONDS else self.possible(size, now, best)


class Pace:
    """The last decode steps of one hop."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._slowdowns: dict[int, deque[float]] = {}
        self.suspected = 0
        """For how many steps on end."""
        self.seconds, self.best, self.size = 0.0, 1.0, size_of(1, 0)
        """The median of the last steps; the least slowdown in the last 256; both of steps of this size."""

    def add(self, size: Size, seconds: float) -> bool:
        """A step took ``seconds``. Whether so many are known that the median says something."""
        steps = self._steps.setdefault(size[0], deque(maxlen=WINDOW))
        steps.append(seconds)
        self.size, self.seconds = size, sorted(steps)[len(steps) // 2]
        return len(steps) == WINDOW

    def compare(self, slowdown: float, slowdowns: Slowdowns, now: float) -> None:
        """The slowdown by the median is ``slowdown``."""
        known = self._slowdowns.setdefault(self.size[0], deque(maxlen=_REMEMBERED))
        known.append(slowdown)
        self.best = min(known)
        suspect = slowdown >= SLOWER * slowdowns.possible(self.size, now, self.best)
        self.suspected = self.suspected + 1 if suspect else 0


class Records(Protocol):
    """What :class:`~swarm.client.routing.swarm_view.SwarmView` knows of nodes."""

    slowdowns: Slowdowns

    def leg(self, peer_id: PeerID, start: int, end: int) -> Leg | None: ...
    def around(self, peer_id: PeerID, start: int, end: int, needs: Needs) -> tuple[Leg, ...]: ...
    def claims(self, legs: Sequence[Leg]) -> list[Claim]: ...


@dataclass(frozen=True)
class Move(Generic[H]):
    """A hop is to be left for ``legs``.

    Attributes:
        seconds, elsewhere: of a step here and there.
        cost: seconds that moving should take.
        patience: seconds after which it is given up.
    """

    hop: H
    legs: tuple[Leg, ...]
    seconds: float
    elsewhere: float
    cost: float
    patience: float

    @property
    def reason(self) -> str:
        """In plain words."""
        return f"a step takes {1e3 * self.seconds:.0f} ms, elsewhere about {1e3 * self.elsewhere:.0f} ms"


class Slowness(Generic[H]):
    """Watches the hops of one session.

    Args:
        max_length: columns that the session will have at most.
    """

    def __init__(self, records: Records, max_length: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._records, self._max_length, self._clock = records, max_length, clock
        self._paces: dict[H, Pace] = {}
        self._cooldown, self._stay_until = _COOLDOWN_SECONDS, -1.0

    def note(self, hops: Sequence[H], seconds: Sequence[float], tokens: int, position: int) -> None:
        """A decode step of ``tokens`` (rows × columns) at column ``position`` took each hop so many seconds."""
        size, now, slowdowns = size_of(tokens, position), self._clock(), self._records.slowdowns
        self._paces = {hop: self._paces.get(hop) or Pace() for hop in hops}
        for (hop, pace), took in zip(self._paces.items(), seconds, strict=True):
            leg = self._records.leg(hop.peer_id, hop.start, hop.end)
            if pace.add(size, took) and leg is not None:
                network, computing = self._records.claims([leg])[0]
                slowdown = max(0.0, pace.seconds - network) / computing
                slowdowns.note(hop.peer_id, size, slowdown, now)
                pace.compare(slowdown, slowdowns, now)

    def due(self, hops: Sequence[H], position: int, rows: int, needs: Callable[[H], Needs]) -> Move[H] | None:
        """The move to make now, before the step at column ``position``. There is no other for a while then."""
        now = self._clock()
        if now < self._stay_until:
            return None
        for hop in hops:
            pace = self._paces.get(hop)
            if pace is None or not pace.suspected or pace.suspected % WINDOW:
                continue
            legs = self._records.around(hop.peer_id, hop.start, hop.end, needs(hop))
            move = self._weigh(hop, pace, legs, position, rows) if legs else None
            if move is not None:
                self._stay_until, self._cooldown = now + self._cooldown, 2 * self._cooldown
                return move
        return None

    def _weigh(self, hop: H, pace: Pace, legs: tuple[Leg, ...], position: int, rows: int) -> Move[H] | None:
        """The move to ``legs``, if it is worth it. The guess is that a session goes on for as long as it has been."""
        now, slowdowns = self._clock(), self._records.slowdowns
        expected = [slowdowns.expected(leg.peer_id, pace.size, now, pace.best) for leg in legs]
        claims = zip(expected, self._records.claims(legs), strict=True)
        elsewhere = sum(claim.network + factor * claim.computing for factor, claim in claims)
        cost = max(
            _MOVE_SECONDS,
            sum(factor * fill_seconds(leg, rows * position) for factor, leg in zip(expected, legs, strict=True)),
        )
        gain = (pace.seconds - elsewhere) * min(self._max_length - position, position)
        if pace.seconds < SLOWER * elsewhere or gain <= cost:
            return None
        return Move(hop, legs, pace.seconds, elsewhere, cost, min(gain, _PATIENCE * cost))
