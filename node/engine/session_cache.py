"""What sessions have in the KV cache and in the store of recurrent states, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.errors import BadRequestError, RemoteError
from swarm.model.span import Span

from .cache.handover import read_tokens, write_tokens
from .cache.kv_cache import KVCache
from .cache.states import StateStore
from .checks import check_step
from .scheduling.row_group import RowGroup
from .scheduling.work import StepWork


class SessionCache:
    """Keeps the rows of sessions of ``span`` as their steps need them.

    Attributes:
        handed_over_tokens: how many were written that another node had in its cache.
    """

    def __init__(self, span: Span, cache: KVCache, states: StateStore | None) -> None:
        self._span = span
        self._cache = cache
        self._states = states
        self.handed_over_tokens = 0

    def prepare(self, session: RowGroup, work: StepWork) -> None:
        """Make ``session`` ready for ``work`` as a whole: rows reordered, cut, and with pages.

        Raises:
            BadRequestError: ``work`` doesn't fit ``session``.
            OutOfCacheError: too few pages are free, or there are too many rows with states. The session is as it was.
            RemoteError: an earlier failure broke the session.
        """
        if session.broken:
            raise RemoteError("a failure lost this session's cache; open a new session and send everything again")
        check_step(self._span, session, work)
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
        session.padding = padding
        session.position = work.start

    def undo(self, session: RowGroup, work: StepWork) -> None:
        """Forget what ``work`` put into the cache, after its batch failed."""
        session.position = work.start
        for row, sequence in enumerate(session.rows):
            self._cache.truncate(sequence, session.row_length(row, work.start))
        if work.hypo_ids is not None and work.hypo_ids != list(range(len(session.rows))):
            session.broken = True  # the rows that it left out are gone, and to reorder again would be wrong
        session.broken |= self._states is not None  # some blocks' states are ahead now

    def read(self, session: RowGroup, first: int, last: int, start: int, end: int) -> list[torch.Tensor]:
        """What the blocks ``first:last`` keep of the columns ``start:end``, as in :mod:`.cache.handover`.

        Raises:
            BadRequestError: the session doesn't have these, or can't hand them over.
        """
        self._check_handover(session)
        if not (session.first <= first < last <= session.last and 0 <= start <= end <= session.position):
            raise BadRequestError(f"columns {start}:{end} of blocks {first}:{last} are not in this session")
        rows = [
            (sequence, session.row_length(row, start), session.row_length(row, end))
            for row, sequence in enumerate(session.rows)
        ]
        return read_tokens(self._span, self._cache, first, last, rows)

    def write(self, session: RowGroup, start: int, end: int, tensors: Sequence[torch.Tensor], *, columns: int) -> None:
        """Put what :meth:`read` gave elsewhere for all blocks of ``session`` behind the columns that it has, with pages
        for ``columns`` in all, so that rows lie side by side. Their shapes have been checked.

        Raises:
            BadRequestError: there is a gap, or the session can't take them.
            OutOfCacheError: too few pages are free.
        """
        self._check_handover(session)
        if not start == session.position <= end <= columns:
            raise BadRequestError(f"columns {start}:{end} don't follow on {session.position}")
        before, after, wanted = (
            [session.row_length(row, column) for row in range(len(session.rows))] for column in (start, end, columns)
        )
        blocks = range(session.first, session.last)
        grow = [all_of_it - kept for all_of_it, kept in zip(wanted, before, strict=True)]
        session.rows = self._cache.arrange(session.rows, sources=None, keep=before, grow=grow, blocks=blocks)
        rows = list(zip(session.rows, before, after, strict=True))
        write_tokens(self._span, self._cache, session.first, session.last, rows, tensors)
        for row, _, length in rows:
            row.length = length
        session.position = end
        self.handed_over_tokens += sum(after) - sum(before)

    def _check_handover(self, session: RowGroup) -> None:
        if self._states is not None:
            raise BadRequestError("this model's recurrent states are not handed over: send everything again")
        if session.closed or session.broken:
            raise BadRequestError("the session has ended")

    def release(self, session: RowGroup) -> None:
        """Free all that ``session`` has."""
        if self._states is not None:
            self._states.release(session.rows)
        self._cache.release(session.rows)
