"""Columns of a session's rows out of the pools, and into another node's: what one node hands over to another.

A block's keys are ``[kv_heads, tokens, key_dim]``, its values ``[kv_heads, tokens, value_dim]``, with the tokens of all
rows one behind the other. A block that uses another one's cache isn't there, nor values that are the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from swarm.model.span import Span

from .kv_cache import KVCache, Row


def tensor_shapes(span: Span, first: int, last: int) -> list[tuple[int, int]]:
    """The heads and the size of a head of each tensor that is handed over for the blocks ``first:last``, in order."""
    shapes = []
    for block in _blocks(span, first, last):
        kv = span.kv[block - span.start]
        assert kv is not None
        shapes += [(kv.kv_heads, kv.key_dim)] + [(kv.kv_heads, kv.value_dim)] * (not kv.shared)
    return shapes


def read_tokens(
    span: Span, cache: KVCache, first: int, last: int, rows: Sequence[tuple[Row, int, int]]
) -> list[torch.Tensor]:
    """What the blocks ``first:last`` keep of each row's tokens ``start:end``, copied to the CPU."""
    index = _slots(cache, rows)
    return [
        pool[:, 0].index_select(1, index.to(pool.device)).cpu()
        for block in _blocks(span, first, last)
        for pool in _pools(span, cache, block)
    ]


def write_tokens(
    span: Span,
    cache: KVCache,
    first: int,
    last: int,
    rows: Sequence[tuple[Row, int, int]],
    tensors: Sequence[torch.Tensor],
) -> None:
    """Puts what :func:`read_tokens` gave into rows that have pages for it, whatever length they have."""
    index, given = _slots(cache, rows), iter(tensors)
    for block in _blocks(span, first, last):
        # blocks that use this one's cache on another device have pools of their own with the same in them
        users = [block, *(user for user, source in span.kv_sources.items() if source == block and first <= user < last)]
        for targets in zip(*(_pools(span, cache, user) for user in users), strict=True):
            tensor = next(given)
            for pool in {id(pool): pool for pool in targets}.values():
                pool[:, 0].index_copy_(1, index.to(pool.device), tensor.to(pool.device))


def _blocks(span: Span, first: int, last: int) -> Iterator[int]:
    """The blocks with a cache of their own."""
    for block in range(first, last):
        if span.kv[block - span.start] is not None and block not in span.kv_sources:
            yield block


def _pools(span: Span, cache: KVCache, block: int) -> list[torch.Tensor]:
    kv = span.kv[block - span.start]
    assert kv is not None
    return [cache.keys[block]] if kv.shared else [cache.keys[block], cache.values[block]]


def _slots(cache: KVCache, rows: Sequence[tuple[Row, int, int]]) -> torch.Tensor:
    slots = [slot for row, start, end in rows for slot in row.slots(start, end, cache.page_size)]
    return torch.tensor(slots, dtype=torch.int64)  # there may be none
