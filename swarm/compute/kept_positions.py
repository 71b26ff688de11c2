"""Position embeddings of many positions, kept, for steps of a few.

To make some takes twenty small operations: a good part of the time of a small block, and a tenth of a millisecond
behind any whose weights have just pushed everything else out of the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOGETHER = 256
"""Positions that are made together."""
_FEW = 8
_MOST = 8  # times so many positions are kept


class KeptPositions:
    """Keeps what ``make`` makes of positions (``[1, N]`` int64 on a device). That may be tensors ``[1, N, …]``, tensors
    ``[n]`` that don't depend on positions, and tuples and dicts of these; whatever else it is isn't kept.

    ``end``: the first position for which there is none to be made; None: there are always more.
    """

    def __init__(self, end: int | None = None) -> None:
        self._end = end
        self._kept: dict[tuple[torch.device, int], Any] = {}

    def get(self, start: int, positions: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> Any:
        """What ``make`` makes of ``positions``, which count on from ``start``."""
        number, at = divmod(start, TOGETHER)
        count = positions.shape[1]
        beyond = self._end is not None and (number + 1) * TOGETHER > self._end
        if count > _FEW or at + count > TOGETHER or beyond:
            return make(positions)
        key = positions.device, number
        if key not in self._kept:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            made = make(torch.arange(number * TOGETHER, (number + 1) * TOGETHER, device=positions.device)[None])
            self._kept[key] = made if _can_cut(made) else None
        kept = self._kept[key]
        return make(positions) if kept is None else _cut(kept, at, count)


def _can_cut(made: Any) -> bool:
    if isinstance(made, (tuple, dict)):
        return all(map(_can_cut, made.values() if isinstance(made, dict) else made))
    return isinstance(made, torch.Tensor) and (made.dim() == 1 or made.shape[:2] == (1, TOGETHER))


def _cut(made: Any, at: int, count: int) -> Any:
    if isinstance(made, torch.Tensor):
        return made if made.dim() == 1 else made.narrow(1, at, count)
    if isinstance(made, dict):
        return {name: _cut(one, at, count) for name, one in made.items()}
    return tuple([_cut(one, at, count) for one in made])
