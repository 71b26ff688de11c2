"""The steps of sessions: what of them runs in a turn, and what comes of it."""

from __future__ import annotations

import logging
import time

import torch

from .scheduling.admission import Admissions
from .scheduling.step_queue import StepQueue, Take
from .scheduling.work import fail
from .session_cache import SessionCache
from .stats import Counters
from .turn import TurnOutput, TurnRunner

logger = logging.getLogger(__name__)


class StepTurns:
    """Turns of the engine over the steps in ``queue``."""

    def __init__(
        self,
        queue: StepQueue,
        sessions: SessionCache,
        runner: TurnRunner,
        admissions: Admissions,
        counters: Counters,
        *,
        by_adapter: bool,
    ) -> None:
        self._queue = queue
        self._sessions = sessions
        self._runner = runner
        self._admissions = admissions
        self._counters = counters
        self._by_adapter = by_adapter

    def choose(self) -> list[Take] | None:
        """What runs next, with its sessions ready for it; None if nothing can."""
        takes = [take for take in self._queue.plan() if take.work.begun or self._begin(take)]
        if self._by_adapter:  # side by side, and still with decode first
            takes.sort(key=lambda take: (not take.work.decodes, take.session.adapter))
        return takes or None

    def run(self, takes: list[Take]) -> TurnOutput:
        """Compute ``takes``. Raises what the blocks raise."""
        return self._runner.run(takes)

    def deliver(self, takes: list[Take], ran: TurnOutput, seconds: float, waited_s: float) -> None:
        """Tell the sessions their results, and the queue what they took."""
        self._counters.prefill_tokens += ran.prefill
        self._counters.decode_tokens += ran.decode
        self._queue.ran(len(takes), seconds, prefill=ran.prefill, decode=ran.decode, waited_s=waited_s)
        for take, output in zip(takes, ran.outputs, strict=True):
            take.work.times.compute_s += seconds
            self._advance(take, output)

    def shrink(self, takes: list[Take]) -> bool:
        """There was no memory for ``takes``: they run divided, in the next turns. False: they can't be divided."""
        divided = self._queue.shrink(takes)
        if divided:
            logger.warning("there is no memory for a batch of %d works: it is divided", len(takes))
        return divided

    def fail(self, takes: list[Take], error: Exception) -> None:
        """``takes`` failed: their sessions are as they were before these works, and the works end."""
        logger.warning("a batch of %d works failed: %r", len(takes), error)
        for session, work, _ in takes:
            self._sessions.undo(session, work)
            self._queue.drop_first(session)
            fail(work.future, error)

    def _begin(self, take: Take) -> bool:
        """Make its session ready. False: its work is cancelled, or has failed."""
        session, work, _ = take
        if not work.future.set_running_or_notify_cancel():
            self._queue.drop_first(session)
            return False
        try:
            self._sessions.prepare(session, work)
        except Exception as error:
            self._queue.drop_first(session)
            fail(work.future, error)
            return False
        if session.reused:  # the client may take less, if another hop of its has less
            self._counters.reused_tokens += session.total_length(min(work.start, session.reused))
            session.reused = 0
        work.begun = True
        return True

    def _advance(self, take: Take, output: torch.Tensor) -> None:
        session, work, columns = take
        if columns < work.columns:
            if work.output is None:
                work.output = output.new_empty(work.rows, work.columns, output.shape[2])
            work.output[:, work.done : work.done + columns] = output
            output = work.output
        work.done += columns
        session.position = work.start + work.done
        if work.done < work.columns:
            self._queue.requeue(session)
            return
        self._admissions.name_pages(session, work)
        self._queue.drop_first(session)
        work.times.queue_s = max(0.0, time.perf_counter() - work.arrived_at - work.times.compute_s)
        if work.decodes:
            self._queue.answered(session)
        work.future.set_result(output)
