"""Attention within chunks of the positions (Llama 4): a batch whose rows are cut where chunks begin.

A query sees the keys of its own chunk only, so a row's tokens in one chunk are a row of their own whose first key is
the chunk's first. With the segments cut that way, attention is what it always is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from swarm.node.engine.batch import Batch, Segment


def in_chunks(batch: Batch, size: int) -> Batch:
    """``batch`` as attention in chunks of ``size`` positions sees it; ``batch`` itself where all rows are shorter."""
    if all(segment.length <= size for segment in batch.segments):
        return batch
    segments = tuple(part for segment in batch.segments for part in _cut(segment, size))
    return replace(batch, segments=segments, short=None)


def _cut(segment: Segment, size: int) -> Iterator[Segment]:
    begin, past = segment.begin, segment.past
    while begin < segment.end:
        first = past - past % size  # of the chunk
        end = min(segment.end, begin + first + size - past)
        index = None if segment.index is None else segment.index[first:]
        yield Segment(begin, end, past - first, segment.base + first, index)
        past += end - begin
        begin = end
