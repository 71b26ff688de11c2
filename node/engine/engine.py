"""The thread that turns waiting work into results."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue
from typing import Any

import torch

from swarm.errors import BadRequestError, LeavingError, OutOfCacheError, RemoteError
from swarm.model.span import Span

from . import dense
from .cache.kv_cache import KVCache, Row
from .cache.states import StateStore
from .checks import check_adapter, check_blocks, check_hidden, check_step
from .deterministic import PIECE_TOKENS, columns_per_piece
from .gpu.acceleration import Acceleration
from .gpu.static_decode import StaticDecode
from .scheduling.admission import Admissions
from .scheduling.gathering import Gatherer
from .scheduling.pacing import Pacer
from .scheduling.scheduler import DECODE_COLUMNS, Waiting, plan_turn
from .scheduling.session import Admission, DenseWork, Prefix, RowGroup, StepTimes, StepWork
from .scheduling.turnstile import Turnstile
from .stats import EngineStats
from .turn import TurnRunner

logger = logging.getLogger(__name__)

STATE_ROWS = 64
_RECENT = 64
_Message = tuple[str, Any]


class Engine:
    """Runs ``span`` for many sessions at once. All methods but :meth:`start` and :meth:`stop` are safe from any thread.

    Results arrive on :class:`concurrent.futures.Future`; their callbacks run in the engine's thread, so they must be
    short (``loop.call_soon_threadsafe`` is what they are for). Result tensors are views that may share memory, made in
    ``torch.inference_mode``: read them, don't write to them.

    Args:
        cache_tokens: how many tokens the KV cache holds, over all sessions.
        page_size: tokens per page of it; by default what ``acceleration`` asks for.
        max_batch_tokens: tokens per turn, the most that are packed together.
        deterministic: cut steps and attention so that a session's bits don't depend on the others, which takes blocks
            that are made for it (``deterministic.make_deterministic``).
        acceleration: what to use of a GPU; by default nothing.
        state_rows: for how many rows recurrent states are kept, in models that have them.
        adapters: names of those that were put into the span (``adapters.put_adapters``).
        turnstile: what nodes of the same machine go through one at a time to compute.
    """

    def __init__(
        self,
        span: Span,
        *,
        cache_tokens: int,
        page_size: int | None = None,
        max_batch_tokens: int = 512,
        acceleration: Acceleration | None = None,
        deterministic: bool = False,
        state_rows: int = STATE_ROWS,
        adapters: Collection[str] = (),
        turnstile: Turnstile | None = None,
    ) -> None:
        self.span = span
        self._adapters = frozenset(adapters)
        acceleration = acceleration or Acceleration()
        self._max_batch_tokens = max_batch_tokens
        self._deterministic = deterministic
        self._cache = KVCache(
            start=span.start,
            tokens=cache_tokens,
            page_size=page_size or acceleration.page_size,
            kv=span.kv,
            dtype=span.dtype,
            device=span.devices,
            kernel=acceleration.kernel,
            sources=span.kv_sources,
        )
        self._states = StateStore(state_rows) if span.state_bytes else None
        self._turns = TurnRunner(
            span,
            self._cache,
            self._states,
            decode=None if acceleration.record is None else StaticDecode(span, self._cache, acceleration.record),
            deterministic=deterministic,
        )
        self._pacer = Pacer(max_batch_tokens)
        self._gatherer = Gatherer()
        self._away: set[RowGroup] = set()  # sessions that decode, are answered and not back yet
        self._waiting_since = 0.0
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._sessions: set[RowGroup] = set()
        self._ready: deque[RowGroup] = deque()  # sessions with waiting work, who waits longest first
        self._dense: deque[DenseWork] = deque()
        self._admissions = Admissions(self._cache, self._sessions)
        self._turnstile = turnstile
        self._waited_s = 0.0  # for this turn
        self._previous: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._gate = threading.Lock()  # between those who put work in and the end of the thread that takes it out
        self._running = False
        self._prefill_tokens = self._decode_tokens = self._dense_tokens = self._batches = self._failures = 0
        self._reused_tokens = 0
        self._busy_s = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def start(self) -> None:
        """Start the engine's thread."""
        self._running = True
        self._thread = threading.Thread(target=self._loop, name="swarm-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it is in. Work that still waits fails with ``LeavingError``."""
        with self._gate:
            if not self._running:
                return
            self._running = False
            self._inbox.put(("stop", None))
        assert self._thread is not None
        self._thread.join()

    def open(
        self, *, rows: int, first: int, last: int, left_padding: Sequence[int] = (), adapter: str = ""
    ) -> RowGroup:
        """A session of ``rows`` rows through the blocks ``first:last`` and an adapter, if any. It takes no cache until
        tokens come, and none is promised to it until it is admitted.

        Raises:
            BadRequestError: the span doesn't hold these blocks or this adapter, or ``left_padding`` isn't one number
                per row.
            OutOfCacheError: there can't be a page for each row.
        """
        check_blocks(self.span, first, last)
        check_adapter(self._adapters, adapter)
        if not self._running:
            raise LeavingError("the node is shutting down")
        if rows < 1 or len(left_padding) not in (0, rows) or any(padding < 0 for padding in left_padding):
            raise BadRequestError(f"a session of {rows} rows can't have left_padding {list(left_padding)}")
        if rows > self._cache.pages.count:
            raise OutOfCacheError(
                f"the KV cache has {self._cache.pages.count} pages, which are too few for {rows} rows"
            )
        sequences = [Row() for _ in range(rows)]
        session = RowGroup(first, last, sequences, list(left_padding) or [0] * rows, adapter)
        self._sessions.add(session)
        return session

    def admit(
        self, session: RowGroup, columns: int, *, prefix: Prefix | None = None, wait: bool = False
    ) -> Future[int]:
        """Promise ``session``, which is new, cache for ``columns``; it begins with what is there of ``prefix``.

        Sessions that hold half of what they need could keep each other from ever finishing, so one is let in only if
        what all others were promised, and it, fit together. One that could never fit is let in alone: rows may share
        pages, and then it can turn out to fit after all. Those that ``wait`` are let in in their order; cancelling the
        future ends the wait.

        The result is the number of columns that are done already: the session's position.

        The future raises ``OutOfCacheError``: there is no room, or others wait for it already, and not to ``wait``.
        """
        if self._states is not None or self._deterministic:  # states aren't in pages, and decode has other last bits
            prefix = None
        future: Future[int] = Future()
        size = self.page_size
        pages = sum(-(-max(0, columns - padding) // size) for padding in session.padding)
        pages += len(session.padding) if prefix is not None and any(session.padding) else 0  # shared, and then copied
        admission = Admission(session, columns, min(pages, self._cache.pages.count), prefix, future)
        self._submit(("admit", (admission, wait)), future)
        return future

    @property
    def page_size(self) -> int:
        """Tokens per page of the KV cache: the names of a :class:`Prefix` are of so many tokens each."""
        return self._cache.page_size

    def close(self, session: RowGroup) -> None:
        """Free what ``session`` holds and cancel its waiting work. Closing twice is fine."""
        session.closed = True
        if not self._put(("close", session)):
            self._close(session)

    def step(
        self,
        session: RowGroup,
        hidden: torch.Tensor,
        *,
        start: int,
        hypo_ids: torch.Tensor | Sequence[int] | None = None,
        prompts: torch.Tensor | None = None,
        names: list[list[bytes]] | None = None,
        times: StepTimes | None = None,
    ) -> Future[torch.Tensor]:
        """Put ``hidden`` ``[rows, T, H]`` through the session's blocks as columns ``start:start + T``.

        ``names`` are those of each row's pages that this step completes, for other sessions in the same context.
        ``times`` is filled in before the result is there.

        The result has the same shape, in the span's dtype; padded columns are zero. Steps of one session run in order.
        ``hypo_ids`` ``[rows]`` may change the number of rows.

        The future raises ``BadRequestError`` (shapes, or ``start`` behind the session's position), ``OutOfCacheError``
        (the session is as it was), ``CancelledError`` (closed meanwhile), or what the blocks raised.
        """
        future: Future[torch.Tensor] = Future()
        try:
            check_hidden(self.span, hidden)
        except BadRequestError as error:
            future.set_exception(error)
            return future
        ids = hypo_ids.tolist() if isinstance(hypo_ids, torch.Tensor) else hypo_ids
        work = StepWork(hidden, start, None if ids is None else list(ids), prompts, future, names)
        work.times = times or work.times
        self._submit(("step", (session, work)), future)
        return future

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        first: int,
        last: int,
        prompts: torch.Tensor | None = None,
        adapter: str = "",
    ) -> Future[torch.Tensor]:
        """``hidden`` ``[rows, T, H]`` through the blocks ``first:last``, without a session."""
        future: Future[torch.Tensor] = Future()
        self._submit(("dense", DenseWork(hidden, None, first, last, prompts, future, adapter=adapter)), future)
        return future

    def backward(
        self,
        hidden: torch.Tensor,
        grad: torch.Tensor,
        *,
        first: int,
        last: int,
        prompts: torch.Tensor | None = None,
        adapter: str = "",
    ) -> Future[tuple[torch.Tensor, torch.Tensor | None]]:
        """Gradients with respect to ``hidden`` and ``prompts`` (same shapes), given ``grad`` of the output."""
        future: Future[tuple[torch.Tensor, torch.Tensor | None]] = Future()
        self._submit(("dense", DenseWork(hidden, grad, first, last, prompts, future, adapter=adapter)), future)
        return future

    def stats(self) -> EngineStats:
        """The engine now."""
        sessions = list(self._sessions)
        return EngineStats(
            sessions=len(sessions),
            cache_tokens=self._cache.tokens,
            cache_tokens_free=self._admissions.free_tokens,
            cache_block_tokens_free=self._admissions.free_block_tokens(self.span.end - self.span.start),
            cache_bytes=self._cache.nbytes,
            waiting=sum(len(session.waiting) for session in sessions) + len(self._dense) + self._inbox.qsize(),
            queued=len(self._admissions),
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            dense_tokens=self._dense_tokens,
            reused_tokens=self._reused_tokens,
            batches=self._batches,
            failures=self._failures,
            busy_s=self._busy_s,
            recent_step_s=tuple(self._recent),
        )

    # What follows from here on runs in the engine's thread.

    def _loop(self) -> None:
        if self.span.device.type == "cuda":
            torch.cuda.set_device(self.span.device)
        with torch.inference_mode():
            while self._receive():
                try:
                    self._take_turn()
                except Exception as error:  # a mistake of ours must not end the node's only engine
                    logger.exception("a turn of the engine failed")
                    for session in list(self._ready):
                        self._end(session, session.waiting[0], error)
        self._fail_all(LeavingError("the node is shutting down"))

    def _take_turn(self) -> None:
        if self._turnstile is None:
            self._turn()
            return
        asked = time.perf_counter()
        self._turnstile.enter()
        try:
            self._waited_s = time.perf_counter() - asked
            if self._receive(patient=False):  # more may have come meanwhile
                self._turn()
        finally:
            self._turnstile.leave()

    def _computed(self) -> None:
        """Others on this machine may compute now: before they hear of the results, or they would stand in the queue."""
        if self._turnstile is not None:
            self._turnstile.leave()

    def _receive(self, *, patient: bool = True) -> bool:
        """Take in all messages, waiting for one if there is nothing to do. False: stop."""
        while self._running:
            try:
                if not self._ready and not self._dense and patient:
                    message = self._inbox.get()
                elif patient and (patience := self._patience_left()):
                    message = self._inbox.get(timeout=patience)
                else:
                    message = self._inbox.get_nowait()
            except Empty:
                return True
            if message[0] != "stop":
                self._accept(message)
        return False

    def _patience_left(self) -> float:
        """How long to wait, with work at hand, for sessions that are due. 0: not at all."""
        if not self._away or not self._ready:
            return 0.0
        due = [session.answered_at + session.away_s for session in self._away if session.away_s is not None]
        now, waiting = time.perf_counter(), len(self._ready)
        return self._gatherer.patience_s(now, waiting, self._waiting_since, due, self._together())

    def _together(self) -> int | None:
        """How many sessions are to decode at a time; None: any number."""
        decoding = {*self._away, *self._ready} if len(self._ready) > 1 or self._away else ()
        return self._gatherer.size(
            time.perf_counter(), (session.away_s for session in decoding if session.away_s is not None)
        )

    def _accept(self, message: _Message) -> None:
        kind, content = message
        if kind == "step":
            session, work = content
            if session.closed:
                work.future.cancel()
                return
            if session in self._away:
                self._away.discard(session)
                session.away_s = self._gatherer.usual(session.away_s, work.arrived_at - session.answered_at)
            if not self._ready:
                self._waiting_since = work.arrived_at
            session.waiting.append(work)
            if len(session.waiting) == 1:
                self._ready.append(session)
        elif kind == "dense":
            self._dense.append(content)
        elif kind == "admit":
            self._admissions.add(content[0], wait=content[1])
        else:
            self._close(content)
            self._admissions.let_in()

    # What runs next

    def _turn(self) -> None:
        self._turn_steps()
        if self._dense:
            self._turn_dense(self._dense.popleft())

    def _turn_steps(self) -> None:
        ready = list(self._ready)
        waiting = [
            Waiting(
                (session.first, session.last),
                session.waiting[0].rows,
                session.waiting[0].columns - session.waiting[0].done,
                session.waiting[0].prompts is not None,
                session.waiting[0].start + session.waiting[0].done,
                columns_per_piece(session.waiting[0].rows) if self._deterministic else 1,
            )
            for session in ready
        ]
        decoding = sum(work.decodes for work in waiting)
        prefill_budget = self._pacer.prefill_budget(
            prefilling=len(waiting) - decoding, decoding=decoding + len(self._away)
        )
        turn = plan_turn(
            waiting,
            budget=self._max_batch_tokens,
            prefill_budget=max(prefill_budget, PIECE_TOKENS if self._deterministic else 0),
            previous=self._previous,
            together=self._together(),
        )
        if turn is None:
            return
        self._previous = turn.blocks
        began = time.perf_counter()
        chosen: list[tuple[RowGroup, StepWork, int]] = []
        for index, columns in turn.takes:
            session = ready[index]
            work = session.waiting[0]
            try:
                if not work.begun and not self._begin(session, work):
                    self._drop_first(session)
                    continue
            except Exception as error:
                self._end(session, work, error)
                continue
            chosen.append((session, work, columns))
        if not chosen:
            return
        if self._adapters:  # side by side, and still with decode first
            chosen.sort(key=lambda one: (one[1].columns > DECODE_COLUMNS, one[0].adapter))
        try:
            outputs, prefill, decode = self._turns.run(chosen, *turn.blocks)
        except Exception as error:
            self._failures += 1
            logger.warning("a batch of %d works failed: %r", len(chosen), error)
            for session, work, _ in chosen:
                self._undo(session, work)
                self._end(session, work, error)
            return
        self._computed()
        seconds = time.perf_counter() - began
        self._prefill_tokens += prefill
        self._decode_tokens += decode
        self._count(seconds)
        self._pacer.ran(prefill=prefill, decode=decode, seconds=seconds)
        self._waiting_since = time.perf_counter()  # who isn't done has had its turn, and can wait for decode again
        if decode:
            self._gatherer.ran(self._waiting_since, seconds, None if prefill else len(chosen), waited_s=self._waited_s)
        for (session, work, columns), output in zip(chosen, outputs, strict=True):
            work.times.compute_s += seconds
            self._advance(session, work, columns, output)

    def _begin(self, session: RowGroup, work: StepWork) -> bool:
        """Make ``session`` ready for ``work`` as a whole: rows reordered, cut, and with pages. False: cancelled."""
        if not work.future.set_running_or_notify_cancel():
            return False
        if session.broken:
            raise RemoteError("a failure lost this session's cache; open a new session and send everything again")
        check_step(self.span, session, work)
        padding = session.padding
        if work.hypo_ids is not None:
            padding = [padding[source] for source in work.hypo_ids]
        end = work.start + work.columns
        keep = [max(0, work.start - pad) for pad in padding]
        before = session.rows
        if self._states is not None:
            self._states.check(before, work.hypo_ids, keep)
        session.rows = self._cache.arrange(
            before,
            sources=work.hypo_ids,
            keep=keep,
            grow=[max(0, end - pad) - kept for pad, kept in zip(padding, keep, strict=True)],
            blocks=range(session.first, session.last),
        )
        if self._states is not None:
            self._states.arrange(before, session.rows, work.hypo_ids, keep)
        if session.reused:  # the client may take less, if another hop of its has less
            self._reused_tokens += sum(
                session.row_length(row, min(work.start, session.reused)) for row in range(len(padding))
            )
            session.reused = 0
        session.padding = padding
        session.position = work.start
        work.begun = True
        return True

    def _advance(self, session: RowGroup, work: StepWork, columns: int, output: torch.Tensor) -> None:
        if columns < work.columns:
            if work.output is None:
                work.output = torch.empty(work.rows, work.columns, self.span.hidden_size, dtype=self.span.dtype)
            work.output[:, work.done : work.done + columns] = output
            output = work.output
        work.done += columns
        session.position = work.start + work.done
        if work.done < work.columns:
            self._ready.remove(session)
            self._ready.append(session)
            return
        self._admissions.name_pages(session, work)
        self._drop_first(session)
        now = time.perf_counter()
        work.times.queue_s = max(0.0, now - work.arrived_at - work.times.compute_s)
        if not session.waiting and work.columns <= DECODE_COLUMNS:
            session.answered_at = now
            self._away.add(session)
        work.future.set_result(output)

    def _undo(self, session: RowGroup, work: StepWork) -> None:
        """Forget what ``work`` put into the cache, after its batch failed."""
        session.position = work.start
        for row, sequence in enumerate(session.rows):
            self._cache.truncate(sequence, session.row_length(row, work.start))
        if work.hypo_ids is not None and work.hypo_ids != list(range(len(session.rows))):
            session.broken = True  # the rows that it left out are gone, and to reorder again would be wrong
        session.broken |= self._states is not None  # some blocks' states are ahead now

    def _end(self, session: RowGroup, work: StepWork, error: Exception) -> None:
        self._drop_first(session)
        work.future.set_exception(error)

    def _drop_first(self, session: RowGroup) -> None:
        """The session's first work is over; the next one queues behind everybody else's."""
        session.waiting.popleft()
        self._ready.remove(session)
        if session.waiting:
            self._ready.append(session)

    def _turn_dense(self, work: DenseWork) -> None:
        """Some rows of ``work``; what is left of it queues behind other such work."""
        if not work.done and not work.future.set_running_or_notify_cancel():
            return
        began = time.perf_counter()
        try:
            check_adapter(self._adapters, work.adapter)
            self._dense_tokens += dense.advance(self.span, work, max_tokens=self._max_batch_tokens)
        except Exception as error:
            self._failures += 1
            work.future.set_exception(error)
            return
        self._computed()
        self._count(time.perf_counter() - began)
        if work.done < work.hidden.shape[0]:
            self._dense.append(work)
        elif work.grad is None:
            work.future.set_result(work.output)  # type: ignore[arg-type]
        else:
            work.future.set_result((work.output, work.prompt_grad))  # type: ignore[arg-type]

    def _close(self, session: RowGroup) -> None:
        if session in self._sessions:
            self._sessions.discard(session)
            if self._states is not None:
                self._states.release(session.rows)
            self._cache.release(session.rows)
            self._away.discard(session)
        if session.waiting:
            self._ready.remove(session)
        for work in session.waiting:
            _cancel(work)
        session.waiting.clear()

    def _fail_all(self, error: Exception) -> None:
        """The thread ends: nothing may be left that somebody waits for."""
        unadmitted = list(self._admissions)
        with self._gate:
            while not self._inbox.empty():
                kind, content = self._inbox.get()
                if kind == "step":
                    content[0].waiting.append(content[1])
                elif kind == "dense":
                    self._dense.append(content)
                elif kind == "admit":
                    unadmitted.append(content[0])
        left: list[StepWork | DenseWork] = [work for session in self._sessions for work in session.waiting]
        left += self._dense
        for future in (*(work.future for work in left), *(admission.future for admission in unadmitted)):
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._admissions.clear()
        for session in self._sessions:
            session.waiting.clear()
            session.closed = True
            self._cache.release(session.rows)
        self._sessions.clear()
        self._ready.clear()
        self._dense.clear()

    def _count(self, seconds: float) -> None:
        self._batches += 1
        self._busy_s += seconds
        self._recent.append(seconds)

    # Shared by both sides.

    def _put(self, message: _Message) -> bool:
        with self._gate:
            if self._running:
                self._inbox.put(message)
            return self._running

    def _submit(self, message: _Message, future: Future[Any]) -> None:
        if not self._put(message):
            future.set_exception(LeavingError("the node is shutting down"))


def _cancel(work: StepWork) -> None:
    """Cancel even what has begun."""
    if not work.future.cancel() and not work.future.done():
        work.future.set_exception(CancelledError())
