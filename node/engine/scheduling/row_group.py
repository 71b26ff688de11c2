"""A session as the engine keeps it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..cache.kv_cache import Row
from .work import StepWork


@dataclass(eq=False)
class RowGroup:
    """Handle of one session; only the engine changes it. ``position`` counts the columns done. ``pages`` is what it was
    promised, for ``tokens`` in all of its rows, ``context`` that of its :class:`Prefix`, and ``reused`` what it found
    in the cache, until its first step. All of it goes through one ``adapter``, or none.
    """

    first: int
    last: int
    rows: list[Row]
    padding: list[int]
    adapter: str = ""
    position: int = 0
    pages: int = 0
    tokens: int = 0
    context: bytes | None = None
    reused: int = 0
    closed: bool = False
    broken: bool = False
    answered_at: float = 0.0  # when it got its last token's result
    away_s: float | None = None  # how long after that its next step usually comes
    waiting: deque[StepWork] = field(default_factory=deque)

    def row_length(self, row: int, column: int) -> int:
        """How many of the first ``column`` columns of ``row`` are no padding."""
        return max(0, column - self.padding[row])

    def total_length(self, column: int) -> int:
        """The same of all rows together."""
        return sum(self.row_length(row, column) for row in range(len(self.padding)))
