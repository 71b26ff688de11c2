"""Attention within chunks of the positions (Llama 4): rows are cut where chunks begin.

A query sees the keys of its own chunk only, so a row's tokens in one chunk are a row of their own whose first key is
the chunk's first. With the segments cut that way, attention is what it always is.
"""

from __future__ import annotations

from collections.abc import Iterator

from .batch import Segment


def in_chunks(segments: tuple[Segment, ...], size: int) -> tuple[Segment, ...]:
    """``segments`` as attention in chunks of ``size`` positions sees them; the same ones where all are shorter."""
    if all(segment.length <= size for segment in segments):
        return segments
    return tuple(part for segment in segments for part in _cut(segment, size))


def _cut(segment: Segment, size: int) -> Iterator[Segment]:
    begin, past = segment.begin, segment.past
    while begin < segment.end:
        first = past - past % size  # of the chunk
        end = min(segment.end, begin + first + size - past)
        index = None if segment.index is None else segment.index[first:]
        yield Segment(begin, end, past - first, segment.base + first, index)
        past += end - begin
        begin = end
