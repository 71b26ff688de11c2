"""What a client sent to a hop, kept so that another node can take the hop's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Entry:
    start: int
    hidden: torch.Tensor  # [rows, T, H]
    hypo_ids: torch.Tensor | None  # how the rows before were reordered ahead of this step


class History:
    """The inputs of a hop in order. Reorderings are noted, and carried out only when the history is needed."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._position = 0
        self.missing = 0
        """Columns at the beginning that the hop had already, so that they were never sent to it."""

    @property
    def position(self) -> int:
        """Columns that the hop has had."""
        return self._position

    def skip(self, columns: int) -> None:
        """Begins behind ``columns`` that the hop has already."""
        self._position = self.missing = columns

    def append(self, start: int, hidden: torch.Tensor, hypo_ids: torch.Tensor | None) -> None:
        """Adds a step that began at column ``start``; columns from there on, if there are any, are replaced."""
        self.crop(start)
        self._entries.append(_Entry(start, hidden, hypo_ids))
        self._position = start + hidden.shape[1]

    def take_back(self) -> None:
        """Forgets the step that was added last, which replaced no columns."""
        self._position = self._entries.pop().start

    def crop(self, position: int) -> None:
        """Forgets the columns from ``position`` on. Reorderings stay: they moved the columns before, too."""
        if position >= self._position:
            return
        self.missing = min(self.missing, position)
        kept: list[_Entry] = []
        for entry in self._entries:
            columns = max(0, min(entry.hidden.shape[1], position - entry.start))
            if columns or entry.hypo_ids is not None:
                kept.append(_Entry(entry.start, entry.hidden[:, :columns], entry.hypo_ids))
        self._entries, self._position = kept, position

    def replay(self, rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """All inputs as one ``[rows, T, H]`` (``None`` if there are none), with the rows as they are now. What is
        ``missing`` is not in them.

        Also gives the row (``[rows]`` int64) that each row was at the beginning.
        """
        order, moved = torch.arange(rows), False
        parts: list[torch.Tensor] = []
        for entry in reversed(self._entries):
            parts.append(entry.hidden[order] if moved else entry.hidden)
            if entry.hypo_ids is not None:
                order, moved = entry.hypo_ids[order], True
        if not parts or not self._position:
            return None, order
        return (parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=1)), order
