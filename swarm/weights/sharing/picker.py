"""Which piece is asked of which peer next. Nothing here talks to anybody.

Rarest first, as in BitTorrent (Cohen, "Incentives Build Robustness in BitTorrent", 2003): what few have is copied
first, so that a seeder with a slow uplink sends each piece about once, and peers have something to give each other.
Whoever wants to use a part before all is there says in which order: then it is rarest first among those that come next.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
Peer = TypeVar("Peer", bound=Hashable)

PATIENCE_SECONDS = 3.0
"""In the endgame, a piece is asked of a second peer when the first has kept it waiting for so long."""
_AT_MOST = 2  # peers of whom a piece is asked at a time


FEWEST_ASKED, MOST_ASKED = 2, 16
_SOON_SECONDS, _LATE_SECONDS = 0.2, 0.4


def next_depth(depth: int, waited: float) -> int:
    """How many pieces to have under way from a peer, when it took ``waited`` seconds from asking for one to having it.

    As many as keep its uplink busy and no more: what is asked for early is chosen by what was known early, and delays
    the peer's word on what it has got.
    """
    change = 1 if waited < _SOON_SECONDS else -1 if waited > _LATE_SECONDS else 0
    return min(max(depth + change, FEWEST_ASKED), MOST_ASKED)


def rarest(candidates: Bits, copies: NDArray[np.int64], generator: np.random.Generator) -> int | None:
    """One of the candidates that have the fewest copies, at random: peers that start together take different ones."""
    (found,) = np.nonzero(candidates)
    if not len(found):
        return None
    counts = copies[found]
    return int(generator.choice(found[counts == counts.min()]))


class Picker(Generic[Peer]):
    """Who has what, what is under way, what is missing.

    Attributes:
        missing: ``[pieces]``; what is wanted and not here.

    Args:
        refused: peers that aren't asked; it grows.
        order: ``[pieces]``; those with smaller numbers first. By default all are equals.
    """

    def __init__(
        self, missing: Bits, refused: set[Peer], seed: int | None = None, *, order: NDArray[np.int64] | None = None
    ) -> None:
        self.missing = missing.copy()
        self._order = np.zeros(len(missing), np.int64) if order is None else order
        self._has: dict[Peer, Bits] = {}
        self._coming: dict[Peer, Bits] = {}
        self._copies = np.zeros(len(missing), np.int64)
        self._asked: dict[int, dict[Peer, float]] = {}
        self._refused = refused
        self._random = np.random.default_rng(seed)

    def tell(self, peer: Peer, has: Bits, coming: Bits) -> None:
        """What a peer has, and what it is getting: the latter counts as a copy, but can't be asked for."""
        if peer in self._refused:
            return
        self._count(peer, -1)
        self._has[peer], self._coming[peer] = has.copy(), coming & ~has
        self._count(peer, 1)

    def next(self, peer: Peer, now: float) -> int | None:
        """The piece to ask this peer for, which then counts as asked for at ``now`` (seconds); None: nothing now."""
        if (has := self._has.get(peer)) is None:
            return None
        candidates = self.missing & has
        candidates[list(self._asked)] = False
        if candidates.any():
            candidates &= self._order == self._order[candidates].min()
        piece = rarest(candidates, self._copies, self._random)
        if piece is None:
            piece = self._overdue(peer, has, now)
        if piece is not None:
            self._asked.setdefault(piece, {})[peer] = now
        return piece

    def arrived(self, peer: Peer, piece: int) -> bool:
        """A piece is here, checked; whether it was still missing."""
        self._asked.pop(piece, None)
        wanted, self.missing[piece] = bool(self.missing[piece]), False
        return wanted

    def lacks(self, peer: Peer, piece: int) -> None:
        """The peer does not have it after all."""
        self._release(peer, piece)
        if peer in self._has:
            self._count(peer, -1)
            self._has[peer][piece] = False
            self._count(peer, 1)

    def leave(self, peer: Peer) -> None:
        """The peer is gone: what was asked of it may be asked of others. It may come back."""
        for piece in list(self._asked):
            self._release(peer, piece)
        self._count(peer, -1)
        self._has.pop(peer, None)
        self._coming.pop(peer, None)

    def refuse(self, peer: Peer) -> None:
        """As :meth:`leave`, for good: it sent what is not the piece."""
        self.leave(peer)
        self._refused.add(peer)

    @property
    def asked(self) -> set[int]:
        """The pieces under way."""
        return set(self._asked)

    def _overdue(self, peer: Peer, has: Bits, now: float) -> int | None:
        """The endgame: what has been under way from others the longest, if all that is missing is under way."""
        if len(self._asked) < np.count_nonzero(self.missing):
            return None
        late = [
            (min(since.values()), piece)
            for piece, since in self._asked.items()
            if has[piece] and peer not in since and len(since) < _AT_MOST
        ]
        if not late or now - min(late)[0] < PATIENCE_SECONDS:
            return None
        return min(late)[1]

    def _release(self, peer: Peer, piece: int) -> None:
        since = self._asked.get(piece, {})
        since.pop(peer, None)
        if not since:
            self._asked.pop(piece, None)

    def _count(self, peer: Peer, by: int) -> None:
        if peer in self._has:
            self._copies += by * (self._has[peer] | self._coming[peer])
