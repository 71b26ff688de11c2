"""The states of rows in layers that keep more than keys and values (see :mod:`swarm.model.families.mixers`).

Such a state has a fixed size and can't be cut back to an earlier token. It is kept for each row and block; a tensor in
it never changes, so rows that continue the same one share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.errors import BadRequestError, OutOfCacheError
from swarm.model.families.mixers import Mixer, MixerStates

from .kv_cache import Row

RowStates = dict[int, MixerStates]
"""One row's, by block."""


class StateStore:
    """The states of at most ``rows`` rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._states: dict[Row, RowStates] = {}

    def check(self, rows: Sequence[Row], sources: Sequence[int] | None, keep: Sequence[int]) -> None:
        """Whether :meth:`arrange` can follow.

        Raises:
            BadRequestError: a row would be cut back to some token other than its first.
            OutOfCacheError: there are too many rows.
        """
        picked = rows if sources is None else [rows[source] for source in sources]
        if any(kept not in (0, row.length) for row, kept in zip(picked, keep, strict=True)):
            raise BadRequestError("this model's recurrent state can't go back: open a new session and send all again")
        if len(self._states) - sum(row in self._states for row in rows) + len(picked) > self.rows:
            raise OutOfCacheError(f"the states of {self.rows} rows are all that fit, and all are taken")

    def arrange(
        self, before: Sequence[Row], after: Sequence[Row], sources: Sequence[int] | None, keep: Sequence[int]
    ) -> None:
        """Rows ``after`` continue rows ``before``, as in :meth:`KVCache.arrange`."""
        old = [self._states.pop(row, {}) for row in before]
        picked = old if sources is None else [old[source] for source in sources]
        for row, states, kept in zip(after, picked, keep, strict=True):
            self._states[row] = dict(states) if kept else {}

    def of(self, row: Row) -> RowStates:
        """The states of a row that was arranged."""
        return self._states[row]

    def release(self, rows: Sequence[Row]) -> None:
        """Forget ``rows``."""
        for row in rows:
            self._states.pop(row, None)


def mix(
    hidden: torch.Tensor,
    rows: Sequence[tuple[int, int, RowStates]],
    block: int,
    mixer: Mixer,
) -> torch.Tensor:
    """``hidden`` ``[1, N, H]`` through ``mixer`` and back: ``rows`` are ``(begin, end, states)``, in order.

    Rows with the same number of tokens go through it together, unless some have states already and some don't.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for number, (begin, end, states) in enumerate(rows):
        groups.setdefault((end - begin, block in states), []).append(number)
    parts: list[torch.Tensor] = [hidden] * len(rows)
    for (_, known), numbers in groups.items():
        joined = join([rows[number][2][block] for number in numbers]) if known else MixerStates()
        given = torch.cat([hidden[:, rows[number][0] : rows[number][1]] for number in numbers])
        outputs = mixer(given, joined)
        for number, output, after in zip(numbers, outputs, split(joined, len(numbers)), strict=True):
            parts[number] = output
            rows[number][2][block] = after
    return torch.cat(parts)[None]


def join(several: Sequence[MixerStates]) -> MixerStates:
    """One for all rows, in tensors of its own: what is done to them in place doesn't reach the rows'."""
    return MixerStates(
        {index: torch.cat([states.conv[index] for states in several]) for index in several[0].conv},
        {index: torch.cat([states.recurrent[index] for states in several]) for index in several[0].recurrent},
    )


def split(joined: MixerStates, rows: int) -> list[MixerStates]:
    """The opposite of :func:`join`. Copies, since a row that rests must not keep the others' memory."""

    def row(tensor: torch.Tensor, number: int) -> torch.Tensor:
        return tensor if rows == 1 else tensor[number : number + 1].clone()

    return [
        MixerStates(
            {index: row(tensor, number) for index, tensor in joined.conv.items()},
            {index: row(tensor, number) for index, tensor in joined.recurrent.items()},
        )
        for number in range(rows)
    ]
