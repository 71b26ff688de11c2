"""The thread that turns waiting work into results."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from swarm.compute.memory import is_out_of_memory
from swarm.errors import BadRequestError, LeavingError, OutOfCacheError, RemoteError
from swarm.model.span import Span

from .cache.kv_cache import KVCache, Row
from .cache.states import StateStore
from .checks import check_adapter, check_blocks, check_hidden
from .dense import DenseTurns
from .gpu.acceleration import Acceleration
from .gpu.static_decode import StaticDecode
from .scheduling.admission import Admissions
from .scheduling.messages import Admit, Close, Dense, Message, Prefix, Step, Stop, Visit, refuse
from .scheduling.row_group import RowGroup
from .scheduling.step_queue import StepQueue
from .scheduling.turnstile import Turnstile
from .scheduling.work import DenseWork, StepTimes, StepWork, fail
from .session_cache import SessionCache
from .stats import Counters, EngineStats
from .steps import StepTurns
from .turn import TurnRunner

logger = logging.getLogger(__name__)

STATE_ROWS = 64
T = TypeVar("T")


class Engine:
    """Runs ``span`` for many sessions at once. All methods but :meth:`start` and :meth:`stop` are safe from any thread.

    Results arrive on :class:`concurrent.futures.Future`; their callbacks run in the engine's thread, so they must be
    short (``loop.call_soon_threadsafe`` is what they are for). Result tensors are views that may share memory, made in
    ``torch.inference_mode``: read them, don't write to them.

    Attributes:
        ended: done when the thread has ended: with an error, the one that all who come then get too, if it broke.

    Args:
        cache_tokens: how many tokens the KV cache holds, over all sessions.
        page_size: tokens per page of it; by default what ``acceleration`` asks for.
        max_batch_tokens: tokens per turn, the most that are packed together.
        deterministic: a session's bits don't depend on the others; for blocks of ``deterministic.make_deterministic``.
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
        self._deterministic = deterministic
        acceleration = acceleration or Acceleration()
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
        self._sessions: set[RowGroup] = set()
        self._session_cache = SessionCache(span, self._cache, self._states)
        self._admissions = Admissions(self._cache, self._sessions)
        self._counters = Counters()
        self._queue = StepQueue(max_batch_tokens, deterministic=deterministic)
        decode = None if acceleration.record is None else StaticDecode(span, self._cache, acceleration.record)
        self._steps = StepTurns(
            self._queue,
            self._session_cache,
            TurnRunner(span, self._cache, self._states, decode=decode, deterministic=deterministic),
            self._admissions,
            self._counters,
            by_adapter=bool(adapters),
        )
        self._dense = DenseTurns(span, self._counters, max_tokens=max_batch_tokens, adapters=self._adapters)
        self._turnstile: AbstractContextManager[float] = turnstile or nullcontext(0.0)
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._gate = threading.Lock()  # between those who put work in and the end of the thread that takes it out
        self._running = False
        self._broke = ""  # how
        self.ended: Future[None] = Future()

    def start(self) -> None:
        """Start the engine's thread."""
        self._running = True
        self._thread = threading.Thread(target=self._run, name="swarm-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it is in. Work that still waits fails with ``LeavingError``."""
        with self._gate:
            if not self._running:
                return
            self._running = False
            self._inbox.put(Stop())
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
            raise self._gone()
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
        self._submit(Admit(session, columns, min(pages, self._cache.pages.count), prefix, wait, future))
        return future

    @property
    def page_size(self) -> int:
        """Tokens per page of the KV cache: the names of a :class:`Prefix` are of so many tokens each."""
        return self._cache.page_size

    def close(self, session: RowGroup) -> None:
        """Free what ``session`` holds and cancel its waiting work. Closing twice is fine."""
        session.closed = True
        if not self._put(Close(session)):
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
        ids = None if ids is None else list(ids)
        work = StepWork(hidden, start, ids, prompts, future, names, times=times or StepTimes())
        self._submit(Step(session, work))
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
        self._submit(Dense(DenseWork(hidden, None, first, last, prompts, future, adapter=adapter)))
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
        self._submit(Dense(DenseWork(hidden, grad, first, last, prompts, future, adapter=adapter)))
        return future

    def visit(self, work: Callable[[SessionCache], T]) -> Future[T]:
        """Does ``work``, which takes a moment, in the engine's thread between turns. Its errors are the future's."""
        future: Future[T] = Future()
        self._submit(Visit(lambda: work(self._session_cache), future))
        return future

    def stats(self) -> EngineStats:
        """The engine now."""
        sessions = list(self._sessions)
        waiting = sum(len(session.waiting) for session in sessions) + len(self._dense.waiting) + self._inbox.qsize()
        return self._counters.stats(
            sessions=len(sessions),
            cache_tokens=self._cache.tokens,
            cache_tokens_free=self._admissions.free_tokens,
            cache_block_tokens_free=self._admissions.free_block_tokens(self.span.end - self.span.start),
            cache_bytes=self._cache.nbytes,
            waiting=waiting,
            queued=len(self._admissions),
            handed_over_tokens=self._session_cache.handed_over_tokens,
        )

    def _put(self, message: Message) -> bool:
        with self._gate:
            if self._running:
                self._inbox.put(message)
            return self._running

    def _submit(self, message: Message) -> None:
        if not self._put(message):
            refuse(message, self._gone())

    def _gone(self) -> RemoteError:
        return RemoteError(self._broke) if self._broke else LeavingError("the node is shutting down")

    # What follows from here on runs in the engine's thread.

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # nothing of it may stay behind: the node would seem to be there, and be dead
            logger.exception("the engine broke")
            self._broke = f"the node's engine broke ({error!r}): the node has to be started again"
        try:
            self._end()
        finally:
            if self._broke:
                self.ended.set_exception(self._gone())
            else:
                self.ended.set_result(None)

    def _loop(self) -> None:
        if self.span.device.type == "cuda":
            torch.cuda.set_device(self.span.device)
        with torch.inference_mode():
            while self._receive():
                try:
                    if self._queue.ready:
                        self._turn(self._steps)
                    if self._dense.waiting:
                        self._turn(self._dense)
                except Exception as error:  # a mistake of ours must not end the node's only engine
                    logger.exception("a turn of the engine failed")
                    for session in list(self._queue.ready):
                        fail(self._queue.drop_first(session).future, error)

    def _turn(self, turns: StepTurns | DenseTurns) -> None:
        """Receive, choose, run, deliver. Other nodes here may compute before anybody hears of the results."""
        with self._turnstile as waited_s:
            if waited_s and not self._receive(patient=False):  # more may have come meanwhile
                return
            began = time.perf_counter()
            chosen: Any = turns.choose()
            if chosen is None:
                return
            try:
                ran: Any = turns.run(chosen)
            except Exception as error:
                self._counters.failures += 1
                if not (is_out_of_memory(error) and turns.shrink(chosen)):
                    turns.fail(chosen, error)
                return
            seconds = time.perf_counter() - began
        self._counters.ran(seconds)
        turns.deliver(chosen, ran, seconds, waited_s)

    def _receive(self, *, patient: bool = True) -> bool:
        """Take in all messages, waiting for one if there is nothing to do. False: stop."""
        while self._running:
            patience = self._patience_s() if patient else 0.0
            try:
                message = self._inbox.get(patience != 0, patience)
            except Empty:
                return True
            try:
                self._accept(message)
            except Exception as error:  # costs only who sent it
                logger.exception("the engine could not take in %s", type(message).__name__)
                refuse(message, error)
        return False

    def _patience_s(self) -> float | None:
        """How long to wait for a message. None: for ever, as there is nothing to do."""
        return self._queue.patience_s() if self._queue.ready or self._dense.waiting else None

    def _accept(self, message: Message) -> None:
        match message:
            case Step(session, work):
                if session.closed:
                    work.future.cancel()
                else:
                    self._queue.add(session, work)
            case Dense(work):
                self._dense.waiting.append(work)
            case Admit():
                self._admissions.add(message)
            case Visit():
                message.run()
            case Close(session):
                self._close(session)
                self._admissions.let_in()

    def _close(self, session: RowGroup) -> None:
        if session in self._sessions:
            self._sessions.discard(session)
            self._session_cache.release(session)
        for work in self._queue.remove(session):
            if not work.future.cancel():
                fail(work.future, CancelledError())  # it has begun

    def _end(self) -> None:
        """The thread ends: nothing may be left that somebody waits for."""
        with self._gate:
            self._running = False
            unread = [self._inbox.get() for _ in range(self._inbox.qsize())]
        left: list[Message] = [Step(session, work) for session in self._sessions for work in session.waiting]
        left += [*map(Dense, self._dense.waiting), *self._admissions, *unread]
        self._admissions.clear()
        self._dense.waiting.clear()
        try:
            for session in self._sessions:
                session.closed = True
                self._queue.remove(session)
                self._session_cache.release(session)
            self._sessions.clear()
        finally:
            for message in left:
                refuse(message, self._gone())
