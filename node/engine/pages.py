"""Which pages of the KV cache are in use, and by how many owners. Bookkeeping only: no tensors here.

Pages are handed out one by one as a sequence grows, yet attention is cheapest over pages that lie side by side. So a
sequence that starts is put in the middle of the widest free gap: it and its left neighbour can both grow there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FREE_RUN = re.compile(rb"\x00+")


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
        self._used = bytearray(count)  # 1 where the page has an owner: lets a regular expression find free gaps

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
        taken: list[int] = []
        page = self.count if after is None else after + 1
        while len(taken) < wanted:
            if page >= self.count or self._used[page]:
                page = self._place(wanted - len(taken))
            self._used[page] = 1
            self._owners[page] = 1
            taken.append(page)
            page += 1
        self.free -= wanted
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Give each of ``pages`` one owner more. A free page may be named: this takes it back after a release."""
        for page in pages:
            if not self._owners[page]:
                self._used[page] = 1
                self.free -= 1
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one owner from each of ``pages``; those without any left are free again."""
        for page in pages:
            if not self._owners[page]:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._owners[page] -= 1
            if not self._owners[page]:
                self._used[page] = 0
                self.free += 1

    def _place(self, wanted: int) -> int:
        start, end = max((gap.span() for gap in _FREE_RUN.finditer(self._used)), key=lambda gap: gap[1] - gap[0])
        if start == 0 or end - start <= wanted:
            return start  # nobody to the left who may grow, or no room to spare
        return min((start + end) // 2, end - wanted)
