"""Who gets into the KV cache, and with which pages of others to begin with."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Set as AbstractSet

from swarm.errors import OutOfCacheError

from ..cache.kv_cache import KVCache
from .messages import Admit, Prefix
from .row_group import RowGroup
from .work import StepWork


class Admissions:
    """Promises the pages of ``cache`` to ``sessions``, those that are open, and keeps the queue of who waits for some.

    All of it runs in the engine's thread, but for :attr:`free_tokens`, :meth:`free_block_tokens` and the length.
    """

    def __init__(self, cache: KVCache, sessions: AbstractSet[RowGroup]) -> None:
        self._cache = cache
        self._sessions = sessions
        self._queue: deque[Admit] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Admit]:
        return iter(self._queue)

    @property
    def free_tokens(self) -> int:
        """Tokens of the cache that are neither taken nor promised."""
        return max(0, self._cache.free_tokens - self._promised_pages() * self._cache.page_size)

    def free_block_tokens(self, blocks: int) -> int:
        """Tokens times blocks, of all ``blocks``, that were promised to nobody: what Petals' servers tell.

        Exact to the token and the block, where pages are rounded up and cover the blocks that a session leaves out. So
        there may be less room than that for the next session. What sessions share counts once.
        """
        promised = sum(one.tokens * (one.last - one.first) for one in list(self._sessions))
        return max(self.free_tokens * blocks, self._cache.tokens * blocks - promised)

    def _promised_pages(self) -> int:
        """What sessions may still take of the pages that are free now."""
        return sum(max(0, one.pages - sum(len(row.pages) for row in one.rows)) for one in list(self._sessions))

    def add(self, admission: Admit) -> None:
        """Let in who is next, or have it queue, or tell it that there is no room if it doesn't want to wait."""
        self._queue.append(admission)
        self.let_in()
        if not admission.wait and self._queue and self._queue[-1] is admission:
            self._queue.pop()
            if admission.future.set_running_or_notify_cancel():
                admission.future.set_exception(
                    OutOfCacheError(f"the KV cache is full: {self.free_tokens} tokens are free")
                )

    def let_in(self) -> None:
        """Admit whoever has room now, in their order."""
        while self._queue:
            admission = self._queue[0]
            if not (admission.session.closed or admission.future.done()):
                found = self._found(admission.session, admission.prefix)
                shared = {page for pages in found for page in pages if self._cache.pages.owners(page)}
                if self._promised_pages() + admission.pages - len(shared) > self._cache.pages.free:
                    return
                self._admit(admission, found)
            self._queue.popleft()

    def clear(self) -> None:
        """Forget who waits."""
        self._queue.clear()

    def name_pages(self, session: RowGroup, work: StepWork) -> None:
        """Let other sessions find the pages that ``work``, which is done, has completed."""
        if work.prompts is not None:
            session.context = None  # from here on nothing follows from the inputs alone
        if session.context is None or work.names is None or len(work.names) != len(session.rows):
            return
        for row, (sequence, names) in enumerate(zip(session.rows, work.names, strict=True)):
            first = session.row_length(row, work.start) // self._cache.page_size
            if first + len(names) == sequence.length // self._cache.page_size:
                self._cache.name_pages(sequence, first, _full_names(session, session.context, names))

    def _admit(self, admission: Admit, found: list[list[int]]) -> None:
        if not admission.future.set_running_or_notify_cancel():
            return
        session, size = admission.session, self._cache.page_size
        session.pages = admission.pages
        session.tokens = session.total_length(admission.columns)
        session.context = None if admission.prefix is None else admission.prefix.context
        ends = (pad + len(pages) * size for pad, pages in zip(session.padding, found, strict=True))
        columns = min(admission.columns, *ends)
        if any(found):
            lengths = [session.row_length(row, columns) for row in range(len(found))]
            self._cache.adopt(
                session.rows,
                [pages[: -(-length // size)] for pages, length in zip(found, lengths, strict=True)],
                lengths,
                blocks=range(session.first, session.last),
                may_copy=self._cache.pages.free - self._promised_pages() > self._cache.pages.count // 4,
            )
            session.position = session.reused = columns
        admission.future.set_result(session.position)

    def _found(self, session: RowGroup, prefix: Prefix | None) -> list[list[int]]:
        """Of each row the first pages that are in the cache."""
        if prefix is None or len(prefix.names) != len(session.rows):
            return [[] for _ in session.rows]
        return [self._cache.find(_full_names(session, prefix.context, names)) for names in prefix.names]


def _full_names(session: RowGroup, context: bytes, names: list[bytes] | tuple[bytes, ...]) -> list[Hashable]:
    return [(context, session.adapter, session.first, session.last, name) for name in names]
