"""What attention needs to know about the tokens that go through the blocks together."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import torch

from swarm.families.mixers import Mixer
from swarm.node.engine.kv_cache import KVCache, Sequence
from swarm.node.engine.states import RowStates, mix

SHORT_ROWS, SHORT_LENGTH = 4, 256
"""From how many rows on, and up to which length, one call over copies is quicker than a call for each row in place."""

# By first query, queries, window and id of the ALiBi slopes; with the slopes, so that the id stays theirs
Masks = dict[tuple[int, int, int | None, int | None], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Segment:
    """The tokens ``begin:end`` of a batch: one row, which has ``past`` cached tokens before them.

    Its keys and values are ``length`` slots from ``base`` on or, where its pages don't lie side by side, the slots in
    ``index`` (``[length]`` int64).
    """

    begin: int
    end: int
    past: int
    base: int
    index: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that the last of its queries sees, itself included."""
        return self.past + self.end - self.begin


@dataclass(frozen=True, eq=False)
class ShortRows:
    """A batch of rows with one new token each and few before it: attention in one call over copies of their keys.

    Attributes:
        index: ``[rows * longest]`` int64, the slots of each row, padded to the longest with its last one.
        mask: ``[rows, 1, 1, longest]``, True where a slot is no padding; None if there is none.
    """

    index: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of many rows, packed flat, whose keys and values go to ``cache``.

    ``positions`` ``[1, N]`` int64 counts tokens within the row; ``slots`` ``[N]`` int64 says where each token's key and
    value go, ``run`` is the first of them where they lie side by side. ``short`` stands for all segments if they are
    short rows, and most blocks can use it instead. What is the same for all blocks is made once; ``masks`` holds the
    masks that the first block made. ``states`` are those of each segment's row, in models that have any.
    """

    cache: KVCache
    positions: torch.Tensor
    slots: torch.Tensor
    run: int | None
    segments: tuple[Segment, ...]
    short: ShortRows | None = None
    masks: Masks = field(default_factory=dict)
    states: tuple[RowStates, ...] = ()

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        """``hidden`` ``[1, N, H]`` through a block's mixer, which is called with each row's tokens and states."""
        rows = [(part.begin, part.end, states) for part, states in zip(self.segments, self.states, strict=True)]
        return mix(hidden, rows, block, mixer)


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """``rows`` independent rows of ``columns`` tokens, packed flat, not cached. Attention over it is differentiable."""

    rows: int
    columns: int
    positions: torch.Tensor
    masks: Masks = field(default_factory=dict)

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        """As :meth:`Batch.mix`, and nothing is kept."""
        return mixer(hidden.view(self.rows, self.columns, -1), None).reshape(hidden.shape)


def pack(cache: KVCache, rows: Listing[tuple[Sequence, int]], device: torch.device) -> Batch:
    """A batch of ``(row, new tokens)``; the rows must have pages for them. Rows without new tokens are left out."""
    size = cache.page_size
    positions: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    for row, new in rows:
        if not new:
            continue
        past, total = row.length, row.length + new
        begin = len(positions)
        positions.extend(range(past, total))
        index = None
        if row.contiguous:
            base = row.pages[0] * size
            slots.extend(range(base + past, base + total))
        else:
            base = 0
            every = row.slots(0, total, size)
            index = torch.tensor(every, device=device)
            slots.extend(every[past:])
        segments.append(Segment(begin, begin + new, past, base, index))
    alone = len(segments) == 1 and segments[0].index is None
    return Batch(
        cache=cache,
        positions=torch.tensor(positions, dtype=torch.int64, device=device)[None],
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        run=slots[0] if alone else None,
        segments=tuple(segments),
        short=_short_rows(segments, device),
    )


def _short_rows(segments: Listing[Segment], device: torch.device) -> ShortRows | None:
    lengths = [segment.length for segment in segments]
    if len(segments) < SHORT_ROWS or max(lengths) > SHORT_LENGTH:
        return None
    if any(segment.index is not None or segment.end - segment.begin != 1 for segment in segments):
        return None
    longest = max(lengths)
    bases = torch.tensor([segment.base for segment in segments], device=device)[:, None]
    ends = torch.tensor(lengths, device=device)[:, None]
    places = torch.arange(longest, device=device)[None]
    return ShortRows(
        index=(bases + torch.minimum(places, ends - 1)).flatten(),
        mask=None if min(lengths) == longest else (places < ends)[:, None, None],
    )


def pack_dense(rows: int, columns: int, device: torch.device) -> DenseBatch:
    """A batch of ``rows`` rows of ``columns`` tokens each."""
    positions = torch.arange(columns, device=device).repeat(rows)[None]
    return DenseBatch(rows, columns, positions)
