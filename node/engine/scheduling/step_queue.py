"""Sessions whose steps wait for the engine, and those that are about to be back with the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .gathering import Gatherer
from .pacing import Pacer
from .row_group import RowGroup
from .scheduler import PIECE_TOKENS, Waiting, columns_per_piece, least_columns, plan_turn
from .work import StepWork

_GROWTH = 64  # turns until a budget that was cut down to nothing is whole again


class Take(NamedTuple):
    """The next ``columns`` of ``work``, the first that waits of ``session``."""

    session: RowGroup
    work: StepWork
    columns: int


class StepQueue:
    """Decides whose steps run in the next turn, of ``max_tokens`` in all, and how long to wait for more of them.

    A session is ready while it has work that waits, and away from when it got a token until it comes with the next.
    """

    def __init__(
        self, max_tokens: int, *, deterministic: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.ready: deque[RowGroup] = deque()  # who waits longest first
        self._away: set[RowGroup] = set()
        self._waiting_since = 0.0
        self._previous: tuple[int, int] | None = None
        self._max_tokens = self._budget = max_tokens
        self._deterministic = deterministic
        self._clock = clock
        self._pacer = Pacer(max_tokens)
        self._gatherer = Gatherer()

    def add(self, session: RowGroup, work: StepWork) -> None:
        """``work`` of ``session``, which is open, has come."""
        if session in self._away:
            self._away.discard(session)
            session.away_s = self._gatherer.usual(session.away_s, work.arrived_at - session.answered_at)
        if not self.ready:
            self._waiting_since = work.arrived_at
        session.waiting.append(work)
        if len(session.waiting) == 1:
            self.ready.append(session)

    def patience_s(self) -> float:
        """How long to wait, with work at hand, for sessions that are due. 0: not at all."""
        if not self._away or not self.ready:
            return 0.0
        due = [session.answered_at + session.away_s for session in self._away if session.away_s is not None]
        return self._gatherer.patience_s(self._clock(), len(self.ready), self._waiting_since, due, self._together())

    def plan(self) -> list[Take]:
        """What runs next, all of it through the same blocks. Nothing if nothing waits."""
        ready = list(self.ready)
        waiting = [self._waiting(session) for session in ready]
        decoding = sum(work.decodes for work in waiting)
        prefill_budget = self._pacer.prefill_budget(
            prefilling=len(waiting) - decoding, decoding=decoding + len(self._away)
        )
        turn = plan_turn(
            waiting,
            budget=self._budget,
            prefill_budget=max(prefill_budget, PIECE_TOKENS if self._deterministic else 0),
            previous=self._previous,
            together=self._together(),
        )
        if turn is None:
            return []
        self._previous = turn.blocks
        return [Take(ready[index], ready[index].waiting[0], columns) for index, columns in turn.takes]

    def ran(self, sessions: int, seconds: float, *, prefill: int, decode: int, waited_s: float) -> None:
        """A batch of so many ``sessions`` and tokens took ``seconds``, and had waited for other nodes before."""
        self._budget = min(self._max_tokens, self._budget + max(1, self._max_tokens // _GROWTH))
        self._pacer.ran(prefill=prefill, decode=decode, seconds=seconds)
        self._waiting_since = self._clock()  # who isn't done has had its turn, and can wait for decode again
        if decode:
            self._gatherer.ran(self._waiting_since, seconds, None if prefill else sessions, waited_s=waited_s)

    def shrink(self, takes: Sequence[Take]) -> bool:
        """There was no memory for ``takes``, which wait again: turns are half as large now, and grow bit by bit.
        False: nothing smaller can run."""
        first = takes[0]
        if len(takes) == 1 and first.columns <= least_columns(self._waiting(first.session)):
            return False
        self._budget = max(1, sum(take.work.rows * take.columns for take in takes) // 2)
        return True

    def requeue(self, session: RowGroup) -> None:
        """The session's first work goes on behind everybody else's."""
        self.ready.remove(session)
        self.ready.append(session)

    def drop_first(self, session: RowGroup) -> StepWork:
        """The session's first work is over, and returned; the next one queues behind everybody else's."""
        work = session.waiting.popleft()
        self.ready.remove(session)
        if session.waiting:
            self.ready.append(session)
        return work

    def answered(self, session: RowGroup) -> None:
        """``session`` got what it decoded, and comes back if nothing of it waits already."""
        if not session.waiting:
            session.answered_at = self._clock()
            self._away.add(session)

    def remove(self, session: RowGroup) -> list[StepWork]:
        """Forget ``session``, and return what waited of it."""
        self._away.discard(session)
        if session.waiting:
            self.ready.remove(session)
        left = list(session.waiting)
        session.waiting.clear()
        return left

    def _waiting(self, session: RowGroup) -> Waiting:
        work = session.waiting[0]
        return Waiting(
            (session.first, session.last),
            work.rows,
            work.columns - work.done,
            work.prompts is not None,
            work.start + work.done,
            columns_per_piece(work.rows) if self._deterministic else 1,
        )

    def _together(self) -> int | None:
        """How many sessions are to decode at a time; None: any number."""
        decoding = {*self._away, *self.ready} if len(self.ready) > 1 or self._away else ()
        return self._gatherer.size(
            self._clock(), (session.away_s for session in decoding if session.away_s is not None)
        )
