"""Which waiting work runs in the next turn: a pure function of plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DECODE_COLUMNS = 8  # a step of so few positions is decode: one token, or a few to check a speculation
PIECE_TOKENS = 64
"""Of a deterministic session, tokens in a call of attention at most; columns are cut at multiples of this, divided by
its rows."""

_PREFILL_SHARE = 4  # while both wait, prefill gets at least one part in so many of the budget


def columns_per_piece(rows: int) -> int:
    """At multiples of so many columns a deterministic session of ``rows`` rows is cut, whatever else waits."""
    return max(1, PIECE_TOKENS // rows)


@dataclass(frozen=True)
class Waiting:
    """One session's next work: ``columns`` positions still to do, for ``rows`` rows, through ``blocks``.

    It may be cut where ``piece`` divides the position, of which the next is ``start``.
    """

    blocks: tuple[int, int]
    rows: int
    columns: int
    alone: bool = False
    start: int = 0
    piece: int = 1

    @property
    def decodes(self) -> bool:
        return self.columns <= DECODE_COLUMNS


@dataclass(frozen=True)
class Turn:
    """What runs now: ``takes`` are ``(index into the waiting work, columns to do)``, all through ``blocks``."""

    blocks: tuple[int, int]
    takes: tuple[tuple[int, int], ...]


def plan_turn(
    waiting: Sequence[Waiting],
    *,
    budget: int,
    prefill_budget: int,
    previous: tuple[int, int] | None = None,
    together: int | None = None,
) -> Turn | None:
    """The next turn over ``waiting`` (in the order of who waits longest), of ``budget`` tokens if something fits.

    Decode comes first, then prefill, cut into pieces of at most ``prefill_budget`` tokens in all. Ranges of blocks take
    turns, beginning after ``previous``, the range of the turn before. At most ``together`` sessions decode while nobody
    waits for prefill. ``None`` if nothing waits.
    """
    if not waiting:
        return None
    ranges = sorted({work.blocks for work in waiting})
    blocks = next((blocks for blocks in ranges if previous is None or blocks > previous), ranges[0])
    here = [(index, work) for index, work in enumerate(waiting) if work.blocks == blocks]
    index, work = here[0]
    limit = budget if work.decodes else min(budget, prefill_budget)
    first_alone = Turn(blocks, ((index, _cut(work, limit) or least_columns(work)),))
    if work.alone:
        return first_alone
    shared = [(index, work) for index, work in here if not work.alone]
    decodes = [(index, work) for index, work in shared if work.decodes]
    prefills = [(index, work) for index, work in shared if not work.decodes]
    if not prefills:
        decodes = decodes[:together]
    takes: list[tuple[int, int]] = []
    left = budget - (min(prefill_budget, budget // _PREFILL_SHARE) if prefills else 0)
    for index, work in decodes:
        if work.rows * work.columns <= left:
            takes.append((index, work.columns))
            left -= work.rows * work.columns
    used = sum(waiting[index].rows * columns for index, columns in takes)
    left = min(budget - used, prefill_budget)
    for index, work in prefills:
        columns = _cut(work, left)
        if columns:
            takes.append((index, columns))
            left -= work.rows * columns
    if here[0][0] not in {taken for taken, _ in takes}:  # more rows than there is room for: it must run some time
        return first_alone
    return Turn(blocks, tuple(takes))


def least_columns(work: Waiting) -> int:
    """How many columns of ``work`` have to run together."""
    return min(work.columns, work.piece - work.start % work.piece)


def _cut(work: Waiting, tokens: int) -> int:
    """How many columns of ``work`` fit into ``tokens``."""
    columns = max(0, tokens) // work.rows
    if columns >= work.columns:
        return work.columns
    return max(0, columns - (work.start + columns) % work.piece)
