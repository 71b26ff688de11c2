"""What attention needs to know about the tokens that go through the blocks together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swarm.compute.transfer import to_device
from swarm.model.families.mixers import Mixer
from swarm.model.probe import SharedKV

from ..cache.kv_cache import KVCache, Row
from ..cache.states import RowStates, mix
from .adapter_tokens import AdapterTokens, adapter_tokens
from .paged_attention import PagedRows, describe_rows

SHORT_ROWS, SHORT_LENGTH = 4, 256
"""From how many rows on, and up to which length, one call over copies is quicker than a call for each row in place."""

Made = dict[tuple[Any, ...], tuple[Any, ...]]
"""What the first block that needs it makes for all. A name with the id of a tensor in it stands for that tensor beside
others, so that the id stays its own."""


@dataclass(frozen=True)
class Segment:
    """The tokens ``begin:end`` of a batch: one row, which has ``past`` cached tokens before them.

    Its keys and values are ``length`` slots from ``base`` on or, where its pages don't lie side by side, the first
    ``length`` slots in ``index`` (int64).
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
    """The first ``count`` rows of a batch, with one new token each and few before it: attention in one call over copies
    of their keys.

    Attributes:
        index: ``[rows * longest]`` int64, the slots of each row, padded to the longest with its last one.
        mask: ``[rows, 1, 1, longest]``, True where a slot is no padding; None if there is none.
    """

    count: int
    index: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of many rows, packed flat, whose keys and values go to ``cache``.

    ``positions`` ``[1, N]`` int64 counts tokens within the row. ``slots`` ``[N]`` int64 says where each token's key and
    value go; if they lie side by side it is None, and ``run`` the first. ``rows`` are the rows with new tokens and
    how many, ``pieces`` how :func:`pack` was told to cut them. ``paged`` describes them for the kernel, if there is
    one. What is the same for all blocks is made once; ``made`` holds what blocks make for one another.
    ``states`` are those of each row, in models that have any. ``shared_kv`` are keys and values of these tokens that
    blocks leave for later ones. ``adapters`` say which tokens go through which.
    """

    cache: KVCache
    positions: torch.Tensor
    slots: torch.Tensor | None
    run: int | None
    rows: tuple[tuple[Row, int], ...]
    pieces: tuple[tuple[int, int], ...] | None = None
    paged: PagedRows | None = None
    made: Made = field(default_factory=dict)
    states: tuple[RowStates, ...] = ()
    shared_kv: SharedKV = field(default_factory=dict)
    adapters: tuple[AdapterTokens, ...] = ()

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        """``hidden`` ``[1, N, H]`` through a block's mixer, which is called with each row's tokens and states."""
        ends = list(itertools.accumulate(new for _, new in self.rows))
        return mix(hidden, list(zip([0, *ends], ends, self.states, strict=False)), block, mixer)

    @property
    def start(self) -> int | None:
        """The first position, if there is one row only: then the others follow from it."""
        return self.rows[0][0].length if len(self.rows) == 1 else None

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The rows one by one. Made when a block asks, since the kernel needs none; valid until the rows grow."""
        return _segments(self.cache, self.rows, self.pieces, self.positions.device)

    @functools.cached_property
    def short(self) -> ShortRows | None:
        """Stands for the first segments where those are short rows, and most blocks can use it instead."""
        return None if self.pieces is not None else _short_rows(self.segments, self.positions.device)

    def to(self, device: torch.device) -> Batch:
        """The same for blocks on ``device``."""
        if device == self.positions.device:
            return self
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            slots=None if self.slots is None else self.slots.to(device, non_blocking=True),
            paged=None if self.paged is None else self.paged.to(device),
            made={},
            shared_kv=_moved(self.shared_kv, device),
        )


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """``rows`` independent rows of ``columns`` tokens, packed flat, not cached. Attention over it is differentiable."""

    rows: int
    columns: int
    positions: torch.Tensor
    made: Made = field(default_factory=dict)
    shared_kv: SharedKV = field(default_factory=dict)
    adapters: tuple[AdapterTokens, ...] = ()
    start: None = None  # of no use here, where there are many tokens

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        """As :meth:`Batch.mix`, and nothing is kept."""
        return mixer(hidden.view(self.rows, self.columns, -1), None).reshape(hidden.shape)

    def to(self, device: torch.device) -> DenseBatch:
        """The same for blocks on ``device``."""
        if device == self.positions.device:
            return self
        positions = self.positions.to(device, non_blocking=True)
        return replace(self, positions=positions, made={}, shared_kv=_moved(self.shared_kv, device))


def _moved(shared_kv: SharedKV, device: torch.device) -> SharedKV:
    return {name: (key.to(device), value.to(device)) for name, (key, value) in shared_kv.items()}


def pack(
    cache: KVCache,
    rows: Sequence[tuple[Row, int]],
    device: torch.device,
    *,
    pieces: Sequence[tuple[int, int]] | None = None,
    states: tuple[RowStates, ...] = (),
    adapters: tuple[AdapterTokens, ...] = (),
) -> Batch:
    """A batch of ``(row, new tokens)``; the rows must have pages for them. Rows without new tokens are left out.

    ``pieces`` make attention over a row independent of the batch: for each row its left padding, and of how many
    columns a segment of it is at most; it ends at multiples of that.
    """
    if pieces is not None:
        pieces = tuple(piece for piece, (_, new) in zip(pieces, rows, strict=True) if new)
    rows = tuple((row, new) for row, new in rows if new)
    paged = None
    if cache.kernel is not None and rows and pieces is None:
        lengths = [row.length + new for row, new in rows]
        paged = describe_rows([new for _, new in rows], lengths, [row.pages for row, _ in rows], device)
    run = slots = None
    if len(rows) == 1 and rows[0][0].contiguous:  # as in most steps of a single stream, for which every call counts
        row, new = rows[0]
        run = row.pages[0] * cache.page_size + row.length
        positions = _counted(1 << max(12, (row.length + new - 1).bit_length()), device).narrow(1, row.length, new)
    else:
        cells = [(row, range(row.length, row.length + new)) for row, new in rows]
        counts = [position for _, span in cells for position in span]
        places = [slot for row, span in cells for slot in row.slots(span.start, span.stop, cache.page_size)]
        longs = to_device(torch.tensor([counts, places]), device, torch.int64)
        positions, slots = longs[:1], longs[1]
    return Batch(
        cache=cache,
        positions=positions,
        slots=slots,
        run=run,
        rows=rows,
        pieces=pieces,
        paged=paged,
        states=states,
        adapters=adapters,
    )


@functools.lru_cache(maxsize=8)
def _counted(size: int, device: torch.device) -> torch.Tensor:
    """The numbers up to ``size``, ``[1, size]`` int64, of which parts are positions."""
    with torch.inference_mode(False):
        return torch.arange(size, device=device)[None]


def _segments(
    cache: KVCache,
    rows: Sequence[tuple[Row, int]],
    pieces: Sequence[tuple[int, int]] | None,
    device: torch.device,
) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    first = 0
    for number, (row, new) in enumerate(rows):
        past, total = row.length, row.length + new
        index = None
        if not row.contiguous:
            index = torch.tensor(row.slots(0, total, cache.page_size), device=device)
        base = 0 if index is not None else row.pages[0] * cache.page_size
        padding, columns = (0, total) if pieces is None else pieces[number]
        at = past
        while at < total:
            end = min(total, (at + padding) // columns * columns + columns - padding)
            segments.append(Segment(first + at - past, first + end - past, at, base, index))
            at = end
        first += new
    return tuple(segments)


def _short_rows(segments: Sequence[Segment], device: torch.device) -> ShortRows | None:
    short = list(itertools.takewhile(_is_short, segments))  # decode comes first, so prefill may follow
    if len(short) < SHORT_ROWS:
        return None
    lengths = [segment.length for segment in short]
    longest = max(lengths)
    bases = torch.tensor([segment.base for segment in short], device=device)[:, None]
    ends = torch.tensor(lengths, device=device)[:, None]
    places = torch.arange(longest, device=device)[None]
    return ShortRows(
        count=len(short),
        index=(bases + torch.minimum(places, ends - 1)).flatten(),
        mask=None if min(lengths) == longest else (places < ends)[:, None, None],
    )


def _is_short(segment: Segment) -> bool:
    return segment.index is None and segment.end - segment.begin == 1 and segment.length <= SHORT_LENGTH


def pack_dense(rows: int, columns: int, device: torch.device, adapter: str = "") -> DenseBatch:
    """A batch of ``rows`` rows of ``columns`` tokens each, all of them through one adapter or none."""
    positions = torch.arange(columns, device=device).repeat(rows)[None]
    return DenseBatch(rows, columns, positions, adapters=adapter_tokens([(adapter, rows * columns)]))
