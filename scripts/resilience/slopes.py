"""Whether something grows: a slope that single jumps do not move, with its confidence interval."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Slope:
    """Growth per hour, and the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def theil_sen(hours: Sequence[float], values: Sequence[float]) -> Slope:
    """The median of the slopes between all pairs of points; the interval is Sen's.

    Raises:
        ValueError: fewer than three points.
    """
    count = len(hours)
    if count < 3:
        raise ValueError("a slope needs three points")
    points = list(zip(hours, values, strict=True))
    slopes = sorted((w - v) / (u - t) for (t, v), (u, w) in itertools.combinations(points, 2))
    width = _NORMAL_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    first = max(0, math.floor((len(slopes) - width) / 2))
    last = min(len(slopes) - 1, math.ceil((len(slopes) + width) / 2))
    return Slope(statistics.median(slopes), slopes[first], slopes[last])


def thinned(hours: Sequence[float], values: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """Medians of so many stretches of equal length: neighbours are alike, and an interval wants independent values."""
    size = max(1, len(hours) // points)
    starts = range(0, len(hours) - size + 1, size)
    return (
        [statistics.median(hours[start : start + size]) for start in starts],
        [statistics.median(values[start : start + size]) for start in starts],
    )
