"""The tensors behind the pages, and the rows of sessions that live in them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from swarm.errors import OutOfCacheError
from swarm.model.probe import KVGeometry

from .paged_kernel import PagedKernel
from .pages import OutOfPages, PageAllocator


@dataclass(eq=False)
class Row:
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
    """Keys and values of the blocks from ``start`` on for about ``tokens`` tokens, shared by all sessions.

    ``keys[block]`` is ``[kv_heads, 1, slots, key_dim]`` and ``values[block]`` ``[kv_heads, 1, slots, value_dim]``, on
    the block's device; ``kv`` has the shape of each. In memory each head's tokens lie together, which is how attention
    on a CPU reads them; with a ``kernel`` that attends over pages it is each token's heads. Memory is claimed but, on a
    CPU, not touched until tokens come. One page covers the same slots in all blocks; those without a cache (None in
    ``kv``) have empty pools.

    A block in ``sources`` has the pools of that other block, if they are on one device. It puts what it is handed there
    once more, which changes nothing; on another device it has pools of its own with the same in them.

    With a ``kernel`` there is one page more, ``spare_page``, that belongs to nobody: rows that only fill up a batch
    write there.
    """

    def __init__(
        self,
        *,
        start: int,
        tokens: int,
        page_size: int,
        kv: Sequence[KVGeometry | None],
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
        kernel: PagedKernel | None = None,
        sources: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.page_size = page_size
        self.pages = PageAllocator(max(1, tokens // page_size))
        self.kernel = kernel
        self.spare_page = self.pages.count
        slots = (self.pages.count + (kernel is not None)) * page_size
        devices = [device] * len(kv) if isinstance(device, torch.device) else device

        def pool(kv_heads: int, dim: int, device: torch.device) -> torch.Tensor:
            if kernel is None:
                return torch.empty(kv_heads, 1, slots, dim, dtype=dtype, device=device)
            tokens = torch.empty(slots, kv_heads, dim, dtype=dtype, device=device)
            tokens[self.spare_page * page_size :] = 0  # is read before it is written, and must be finite
            return tokens.transpose(0, 1)[:, None]

        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        owners: dict[tuple[int, torch.device], int] = {}
        for block, (shape, place) in enumerate(zip(kv, devices, strict=True), start):
            shape = shape or KVGeometry(0, 0, 0)
            owner = owners.setdefault((sources.get(block, block), place), block)
            if owner != block:
                self.keys[block], self.values[block] = self.keys[owner], self.values[owner]
                continue
            keys = self.keys[block] = pool(shape.kv_heads, shape.key_dim, place)
            self.values[block] = keys if shape.shared else pool(shape.kv_heads, shape.value_dim, place)

    def in_kernel(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether the kernel, which there is, takes heads of the size that is in these pools."""
        return self.kernel is not None and self.kernel.suits(keys.dtype, keys.shape[3], values.shape[3])

    @property
    def tokens(self) -> int:
        """How many tokens fit in all."""
        return self.pages.count * self.page_size

    @property
    def nbytes(self) -> int:
        """Memory of all pools."""
        return sum(pool.nbytes for pool in self._pools(self.keys))

    @property
    def free_tokens(self) -> int:
        """How many tokens fit into the free pages."""
        return self.pages.free * self.page_size

    def release(self, rows: Sequence[Row]) -> None:
        """Free what ``rows`` hold; they are empty afterwards."""
        for row in rows:
            self.pages.release(row.pages)
            row.pages, row.length, row.contiguous = [], 0, True

    def truncate(self, row: Row, length: int) -> None:
        """Forget the tokens of ``row`` from ``length`` on, and free every page that is empty then."""
        kept = -(-length // self.page_size)
        self.pages.release(row.pages[kept:])
        del row.pages[kept:]
        row.length = length
        row.contiguous = row.contiguous or _side_by_side(row.pages)

    def find(self, names: Sequence[Hashable]) -> list[int]:
        """The pages that have the first of ``names``, as far as all of them are there."""
        pages = [self.pages.find(name) for name in names]
        found = pages.index(None) if None in pages else len(pages)
        return [page for page in pages[:found] if page is not None]

    def adopt(
        self,
        rows: Sequence[Row],
        pages: Sequence[Sequence[int]],
        lengths: Sequence[int],
        *,
        blocks: range,
        may_copy: bool,
    ) -> None:
        """Let the empty ``rows`` begin with tokens that are in ``pages``, ``lengths`` of them in each.

        Pages are shared where the row can go on right behind them. Elsewhere, if the caller ``may_copy`` and it fits,
        they are copied: that costs about what attention over a row in two pieces costs more for every single token.
        """
        for table in pages:
            self.pages.retain(table)
        for row, table, length in zip(rows, pages, lengths, strict=True):
            moves = length % self.page_size or (table and not self.pages.has_free_behind(table[-1]))
            row.pages, row.length = list(table), length
            if moves and may_copy and len(table) <= self.pages.free:
                row.pages = self.pages.take(len(table))
                for source, target in zip(table, row.pages, strict=True):
                    self._copy_page(source, target, blocks)
                self.pages.release(table)
            row.contiguous = _side_by_side(row.pages)

    def name_pages(self, row: Row, first: int, names: Sequence[Hashable]) -> None:
        """Let others find the pages ``first:first + len(names)`` of ``row``, which are full."""
        for page, name in zip(row.pages[first : first + len(names)], names, strict=True):
            self.pages.name(page, name)

    def arrange(
        self,
        rows: Sequence[Row],
        *,
        sources: Sequence[int] | None,
        keep: Sequence[int],
        grow: Sequence[int],
        blocks: range,
    ) -> list[Row]:
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
            for page in row.pages:
                if self.pages.owners(page) == 1 and self.pages.named(page):
                    self.pages.unname(page)  # cut off: better blank, for what comes instead goes right there
            self.pages.release(row.pages)
        copies: list[tuple[int, int]] = []
        try:
            for table, kept, more in zip(tables, keep, grow, strict=True):
                if more:
                    copies += self._grow(table, kept, kept + more)
        except OutOfPages as error:
            for table in tables:
                self.pages.release(table)
            for row in rows:
                self.pages.retain(row.pages)  # nobody else ran in between, so they are all still there
            raise OutOfCacheError(f"the KV cache is full: {error}") from None
        for source, target in copies:
            self._copy_page(source, target, blocks)
        return [Row(kept, table, _side_by_side(table)) for table, kept in zip(tables, keep, strict=True)]

    def _grow(self, table: list[int], kept: int, end: int) -> list[tuple[int, int]]:
        """Give a row with pages ``table``, ``kept`` tokens long, pages for ``end``. Returns which pages are to be
        copied, and to where: those that others have too and the row would write to.

        Raises:
            OutOfPages: too few are free. The caller still has all that is in ``table``.
        """
        copies: list[tuple[int, int]] = []
        if kept % self.page_size and self.pages.owners(table[-1]) > 1:
            shared = table[-1]
            table[-1:] = self.pages.take(1, after=table[-2] if len(table) > 1 else None)
            self.pages.release([shared])
            copies.append((shared, table[-1]))
        elif kept % self.page_size and self.pages.named(table[-1]):
            self.pages.unname(table[-1])
        missing = -(-end // self.page_size) - len(table)
        table += self.pages.take(missing, after=table[-1] if table else None)
        return copies

    def _has_room(self, rows: Sequence[Row], keep: Sequence[int], grow: Sequence[int]) -> bool:
        """Whether the rows can go on in the pages that they have: what nearly every decode step finds."""
        size = self.page_size
        for row, kept, more in zip(rows, keep, grow, strict=True):
            if row.length != kept or kept + more > len(row.pages) * size:
                return False
            if more and kept % size and (self.pages.owners(row.pages[-1]) > 1 or self.pages.named(row.pages[-1])):
                return False
        return True

    def _pools(self, blocks: Iterable[int]) -> Iterable[torch.Tensor]:
        """The pools of ``blocks``, each once: blocks may share them, and keys may be values too."""
        return {id(pool): pool for block in blocks for pool in (self.keys[block], self.values[block])}.values()

    def _copy_page(self, source: int, target: int, blocks: range) -> None:
        size = self.page_size
        for pool in self._pools(blocks):
            pool.narrow(2, target * size, size).copy_(pool.narrow(2, source * size, size))


def _side_by_side(pages: Sequence[int]) -> bool:
    return all(right == left + 1 for left, right in itertools.pairwise(pages))
