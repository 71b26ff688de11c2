"""Which pages of the KV cache are in use, and by how many owners. Bookkeeping only: no tensors here.

Pages are handed out one by one as a sequence grows, yet attention is cheapest over pages that lie side by side. So a
sequence that starts is put in the middle of the widest free gap: it and its left neighbour can both grow there.

A page may have a name, which says what it was computed from. When the last owner is gone it stays as it is until room
is needed, so that a session that begins alike can have it back. Such pages count as free.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterable

_BLANK, _OWNED, _KEPT = 0, 1, 2  # a page that is kept has a name and no owner
_BLANK_RUN = re.compile(rb"\x00+")
_DROPPED_SHARE = 8  # when blank pages run out, so many-th of all pages is made blank at once: gaps stay wide


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. Nothing was taken."""


class PageAllocator:
    """``count`` pages, numbered from 0. A page is free while it has no owner; sharing a page gives it more owners.

    Not thread-safe: it belongs to the engine's thread. Reading ``free`` from elsewhere is fine.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._owners = [0] * count
        self._state = bytearray(count)  # lets a regular expression find gaps of blank pages
        self._names: dict[int, Hashable] = {}
        self._pages: dict[Hashable, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def owners(self, page: int) -> int:
        """How many sequences hold ``page``; 0 for a free one."""
        return self._owners[page]

    def take(self, wanted: int, after: int | None = None) -> list[int]:
        """``wanted`` free pages with one owner each, side by side and behind page ``after`` as far as possible.

        Raises:
            OutOfPages: fewer are free.
        """
        if wanted > self.free:
            raise OutOfPages(f"{wanted} pages are wanted, {self.free} of {self.count} are free")
        if wanted > self.free - len(self._kept):
            self._drop(wanted)
        taken: list[int] = []
        page = self.count if after is None else after + 1
        while len(taken) < wanted:
            if page >= self.count or self._state[page] != _BLANK:
                page = self._place(wanted - len(taken))
            self._state[page] = _OWNED
            self._owners[page] = 1
            taken.append(page)
            page += 1
        self.free -= wanted
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Give each of ``pages`` one owner more. A free page may be named: this takes it back after a release."""
        for page in pages:
            if not self._owners[page]:
                self._state[page] = _OWNED
                self._kept.pop(page, None)
                self.free -= 1
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one owner from each of ``pages``; those without any left are free again."""
        for page in reversed(list(pages)):  # of what is kept, the end is dropped first: nobody can use it alone
            if not self._owners[page]:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._owners[page] -= 1
            if not self._owners[page]:
                self.free += 1
                self._state[page] = _BLANK
                if page in self._names:
                    self._state[page] = _KEPT
                    self._kept[page] = None

    def has_free_behind(self, page: int) -> bool:
        """Whether a sequence that ends in ``page`` could grow in place."""
        return page + 1 < self.count and self._state[page + 1] == _BLANK

    def name(self, page: int, name: Hashable) -> None:
        """Say what an owned ``page`` holds. Nobody may write to it from now on, unless :meth:`unname` comes first.
        Nothing happens if another page has that name."""
        if page not in self._names and name not in self._pages:
            self._names[page] = name
            self._pages[name] = page

    def named(self, page: int) -> bool:
        """Whether ``page`` has a name."""
        return page in self._names

    def find(self, name: Hashable) -> int | None:
        """The page of that name, owned or kept. :meth:`retain` it before anything else is done."""
        return self._pages.get(name)

    def unname(self, page: int) -> None:
        """``page`` is about to hold something else."""
        del self._pages[self._names.pop(page)]

    def _drop(self, wanted: int) -> None:
        """Make kept pages blank until ``wanted`` are, and some more."""
        blank = self.free - len(self._kept)
        for _ in range(min(len(self._kept), max(wanted, self.count // _DROPPED_SHARE) - blank)):
            page, _ = self._kept.popitem(last=False)
            self.unname(page)
            self._state[page] = _BLANK

    def _place(self, wanted: int) -> int:
        start, end = max((gap.span() for gap in _BLANK_RUN.finditer(self._state)), key=lambda gap: gap[1] - gap[0])
        if start == 0 or end - start <= wanted:
            return start  # nobody to the left who may grow, or no room to spare
        return min((start + end) // 2, end - wanted)
