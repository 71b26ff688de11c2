"""Sets of byte ranges ``(start, stop)`` of one file, and which of them to ask a server for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Range = tuple[int, int]

GAP = 1 << 20
"""Bytes that nobody wants are read along if they are no more than this: asking again costs a round trip."""
WHOLE = 0.8
"""From this part of a file on, the rest is taken too: a whole file can be checked against its hash."""


@dataclass(frozen=True)
class DownloadPlan:
    """How to get what is wanted of a file.

    Attributes:
        whole: as one download, by the Hub's own library.
        missing: else these ranges, in order.
        bytes: to be downloaded.
    """

    whole: bool
    missing: tuple[Range, ...]
    bytes: int


def merge(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """In order, none empty, those that touch or lie at most ``gap`` bytes apart made one."""
    merged: list[Range] = []
    for start, stop in sorted(found for found in ranges if found[0] < found[1]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(wanted: Iterable[Range], present: Iterable[Range]) -> list[Range]:
    """What is in ``wanted`` and not in ``present``."""
    left, have = [], merge(present)
    for start, stop in merge(wanted):
        for low, high in have:
            if start < low < stop:
                left.append((start, low))
            if low < stop and high > start:
                start = high
        left.append((start, stop))
    return merge(left)


def total(ranges: Iterable[Range]) -> int:
    """Bytes in the ranges together."""
    return sum(stop - start for start, stop in merge(ranges))


def plan_download(size: int, present: Iterable[Range], wanted: Iterable[Range]) -> DownloadPlan:
    """What to download of a file of ``size`` bytes of which ``present`` is here."""
    have, want = merge(present), merge(wanted)
    missing = subtract(want, have)
    if not missing:
        return DownloadPlan(False, (), 0)
    if total(missing) > WHOLE * size:
        return DownloadPlan(True, (), size)
    if total([*have, *want]) > WHOLE * size:
        want = [(0, size)]
    # Merged before what is present is taken out, or the gaps that are read along would be read again.
    missing = subtract(merge(want, GAP), have)
    return DownloadPlan(False, tuple(missing), total(missing))
