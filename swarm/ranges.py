"""Sets of whole numbers as ranges ``(start, end)``, without the end: blocks of a model, bytes of a file."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]


def merge(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The ranges in order, none empty; ranges that touch or lie at most ``gap`` apart are made one."""
    merged: list[Range] = []
    for start, end in sorted(found for found in ranges if found[0] < found[1]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(wanted: Iterable[Range], present: Iterable[Range]) -> list[Range]:
    """What is in ``wanted`` and not in ``present``."""
    left, have = [], merge(present)
    for start, end in merge(wanted):
        for low, high in have:
            if start < low < end:
                left.append((start, low))
            if low < end and high > start:
                start = high
        left.append((start, end))
    return merge(left)


def total(ranges: Iterable[Range]) -> int:
    """How many numbers are in the ranges together."""
    return sum(end - start for start, end in merge(ranges))


def as_ranges(numbers: Iterable[int]) -> tuple[Range, ...]:
    """The ranges that hold just these numbers."""
    return tuple(merge((number, number + 1) for number in numbers))


def describe(ranges: Iterable[Range]) -> str:
    """``((3, 6), (9, 10))`` as ``"3:6, 9:10"``."""
    return ", ".join(f"{start}:{end}" for start, end in ranges)
