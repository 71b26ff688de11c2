"""Which byte ranges ``(start, stop)`` of a file to ask a server for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..ranges import Range, merge, subtract, total

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
