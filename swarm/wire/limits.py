"""How much a node takes in one message, and how a batch that is larger is divided."""

from __future__ import annotations

from dataclasses import dataclass

from .records import ServerInfo

MAX_ROWS = 256
"""Rows of a session or a request, unless a node's record says otherwise."""
MAX_STEP_TOKENS = 8192
"""Rows × columns of one message, unless a node's record says otherwise."""
_PETALS_TOKENS = 2048  # max_batch_size of its servers, the smaller of two defaults; its records don't tell


@dataclass(frozen=True)
class MessageLimits:
    """Rows of a session or a request, and rows × columns of one message, at most."""

    rows: int = MAX_ROWS
    tokens: int = MAX_STEP_TOKENS

    def rows_of(self, columns: int) -> int:
        """How many rows of so many columns one message takes; 0 if not even one."""
        return min(self.rows, self.tokens // max(1, columns))


def limits_of(info: ServerInfo) -> MessageLimits:
    """What a node says in its record, or else what nodes like it take."""
    if info.offer is None:
        return MessageLimits(tokens=_PETALS_TOKENS)
    return MessageLimits(info.offer.max_rows or MAX_ROWS, info.offer.max_step_tokens or MAX_STEP_TOKENS)


def divide_rows(rows: int, most: int, together: int = 1) -> list[slice]:
    """``rows`` as parts of about the same size, ``most`` in each. Every ``together`` rows, counted from the first, are
    in one part.

    Raises:
        ValueError: that can't be, as ``most`` is less than ``together``.
    """
    if most < together:
        raise ValueError(f"{together} rows can't be together in parts of {most}")
    groups = -(-rows // together)
    parts = -(-groups // (most // together))
    size = -(-groups // max(1, parts)) * together
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)] if rows else []
