"""The tensors behind the pages, and the rows of sessions that live in them."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import torch

from swarm.errors import OutOfCacheError
from swarm.node.engine.pages import OutOfPages, PageAllocator


@dataclass(eq=False)
class Sequence:
    """One row of a session: ``length`` cached tokens in ``pages``, in order. Changed by :class:`KVCache` only."""

    length: int = 0
    pages: list[int] = field(default_factory=list)
    contiguous: bool = True

    def slots(self, start: int, end: int, page_size: int) -> list[int]:
        """Where the tokens ``start:end`` of this row are in the pools."""
        if start >= end:
            return []
        if self.contiguous:
            base = self.pages[0] * page_size
            return list(range(base + start, base + end))
        return [self.pages[token // page_size] * page_size + token % page_size for token in range(start, end)]


class KVCache:
    """Keys and values of the blocks ``start:end`` for about ``tokens`` tokens, shared by all sessions.

    ``keys[block]`` is ``[kv_heads, 1, slots, key_dim]`` and ``values[block]`` ``[kv_heads, 1, slots, value_dim]``: each
    head's tokens lie together, which is how attention reads them. Memory is claimed but, on a CPU, not touched until
    tokens come. One page covers the same slots in all blocks; those ``without`` a cache of their own have empty pools.
    ``shared`` keys and values are one pool.
    """

    def __init__(
        self,
        *,
        start: int,
        end: int,
        tokens: int,
        page_size: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        without: Collection[int] = (),
        shared: bool = False,
    ) -> None:
        self.page_size = page_size
        self.pages = PageAllocator(tokens // page_size)
        slots = self.pages.count * page_size

        def pools(dim: int) -> dict[int, torch.Tensor]:
            return {
                block: torch.empty(0 if block in without else kv_heads, 1, slots, dim, dtype=dtype, device=device)
                for block in range(start, end)
            }

        self.keys = pools(key_dim)
        self.values = self.keys if shared else pools(value_dim)

    @property
    def tokens(self) -> int:
        """How many tokens fit in all."""
        return self.pages.count * self.page_size

    @property
    def free_tokens(self) -> int:
        """How many tokens fit into the free pages."""
        return self.pages.free * self.page_size

    def release(self, rows: Listing[Sequence]) -> None:
        """Free what ``rows`` hold; they are empty afterwards."""
        for row in rows:
            self.pages.release(row.pages)
            row.pages, row.length, row.contiguous = [], 0, True

    def truncate(self, row: Sequence, length: int) -> None:
        """Forget the tokens of ``row`` from ``length`` on, and free every page that is empty then."""
        kept = -(-length // self.page_size)
        self.pages.release(row.pages[kept:])
        del row.pages[kept:]
        row.length = length
        row.contiguous = row.contiguous or _side_by_side(row.pages)

    def arrange(
        self,
        rows: Listing[Sequence],
        *,
        sources: Listing[int] | None,
        keep: Listing[int],
        grow: Listing[int],
        blocks: range,
    ) -> list[Sequence]:
        """Rows for the next step: new row ``i`` continues ``rows[sources[i]]`` (``None``: ``rows[i]``), cut to
        ``keep[i]`` tokens, with pages for ``grow[i]`` more.

        Full pages are shared between rows that continue the same one; a page that two would write to is copied, in the
        pools of ``blocks``. The old rows are used up by this.

        Raises:
            OutOfCacheError: too few pages are free. The old rows are as they were.
        """
        if sources is None and self._has_room(rows, keep, grow):
            return list(rows)
        picked = rows if sources is None else [rows[source] for source in sources]
        tables = [row.pages[: -(-kept // self.page_size)] for row, kept in zip(picked, keep, strict=True)]
        for table in tables:
            self.pages.retain(table)
        for row in rows:
            self.pages.release(row.pages)
        copies: list[tuple[int, int]] = []
        try:
            for table, kept, more in zip(tables, keep, grow, strict=True):
                if not more:
                    continue
                if kept % self.page_size and self.pages.owners(table[-1]) > 1:
                    shared = table[-1]
                    own = self.pages.take(1, after=table[-2] if len(table) > 1 else None)
                    self.pages.release([shared])
                    table[-1:] = own
                    copies.append((shared, own[0]))
                missing = -(-(kept + more) // self.page_size) - len(table)
                table += self.pages.take(missing, after=table[-1] if table else None)
        except OutOfPages as error:
            for table in tables:
                self.pages.release(table)
            for row in rows:
                self.pages.retain(row.pages)  # nobody else ran in between, so they are all still there
            raise OutOfCacheError(f"the KV cache is full: {error}") from None
        for source, target in copies:
            self._copy_page(source, target, blocks)
        return [Sequence(kept, table, _side_by_side(table)) for table, kept in zip(tables, keep, strict=True)]

    def _has_room(self, rows: Listing[Sequence], keep: Listing[int], grow: Listing[int]) -> bool:
        """Whether the rows can go on in the pages that they have: what nearly every decode step finds."""
        size = self.page_size
        for row, kept, more in zip(rows, keep, grow, strict=True):
            if row.length != kept or kept + more > len(row.pages) * size:
                return False
            if more and kept % size and self.pages.owners(row.pages[-1]) > 1:
                return False
        return True

    def _copy_page(self, source: int, target: int, blocks: range) -> None:
        size = self.page_size
        for block in blocks:
            for pool in (self.keys[block], self.values[block]):
                pool.narrow(2, target * size, size).copy_(pool.narrow(2, source * size, size))


def _side_by_side(pages: Listing[int]) -> bool:
    return all(right == left + 1 for left, right in itertools.pairwise(pages))
