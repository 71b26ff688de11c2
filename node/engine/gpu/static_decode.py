"""Decode steps over buffers that stay where they are, so that they can be recorded once and played again.

A decode step launches some dozen small kernels a block, and on a GPU that takes longer than running them. Recorded as
a CUDA graph they are launched as one. A recording has fixed shapes and addresses, so batches are filled up to one of a
few sizes with rows that nobody looks at, and everything that changes from step to step is copied into the same buffers.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from swarm.compute.memory import is_out_of_memory
from swarm.compute.transfer import staged, to_host
from swarm.model.span import Span

from ..attention.batch import Batch
from ..attention.paged_attention import PagedRows
from ..cache.kv_cache import KVCache, Row
from ..executor import run_blocks

logger = logging.getLogger(__name__)

HEIGHTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows that a recording has. Larger batches run unrecorded: the launches are a small part of their time."""

_MOST_RECORDINGS = 64
Step = Callable[[], None]
Record = Callable[[torch.device, Step], Step]
"""Makes of a step, which may be run several times for that, something that does the same to the same memory."""


class StaticDecode:
    """Runs decode steps of ``span`` over static buffers.

    Args:
        cache: one with a kernel, whose inputs can be described by tensors alone.
        record: turns a step on a device into its recording.
    """

    def __init__(self, span: Span, cache: KVCache, record: Record) -> None:
        self._span, self._cache, self._record = span, cache, record
        self._buffers = {device: _Buffers(span, cache, device) for device in dict.fromkeys(span.devices)}
        self._recordings: OrderedDict[tuple[int, int, int, int], Step] = OrderedDict()
        self._refused: set[tuple[int, int]] = set()

    def run(self, rows: Sequence[tuple[Row, int]], hidden: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
        """``hidden`` ``[N, H]`` on the CPU, one token for each of ``rows`` that has new ones, through ``first:last``.

        Returns the same shape, on the CPU; None if this can't be done here, with nothing changed.
        """
        rows = [(row, new) for row, new in rows if new]
        if len(rows) > HEIGHTS[-1] or any(new != 1 for _, new in rows) or (first, last) in self._refused:
            return None
        height, width = fitting(len(rows), max(row.length + 1 for row, _ in rows), self._cache)
        states = torch.zeros(1, height, hidden.shape[1], dtype=self._span.dtype)
        states[0, : len(rows)] = hidden
        inputs = states, *_inputs([row for row, _ in rows], height, width, self._cache)
        states, longs, ints = (staged(tensor, self._span.device) for tensor in inputs)
        for device, begin, end in self._span.runs(first, last):
            buffers = self._buffers[device]
            buffers.fill(states, longs, ints)
            try:
                recording = self._recording(device, begin, end, height, width)
            except Exception as error:
                self._not_recorded(error, first, last)
                return None
            recording()
            states = buffers.output[:, :height]
        return to_host(states[0, : len(rows)])

    def _recording(self, device: torch.device, begin: int, end: int, height: int, width: int) -> Step:
        """For the blocks ``begin:end``, all on ``device``, whose buffers hold a step."""
        key = (begin, end, height, width)
        if key in self._recordings:
            self._recordings.move_to_end(key)
            return self._recordings[key]
        buffers = self._buffers[device]

        def step() -> None:
            batch = buffers.batch(self._cache, height, width)
            output = run_blocks(self._span, buffers.hidden[:, :height], batch, first=begin, last=end)
            buffers.output[:, :height].copy_(output)

        recording = self._record(device, step)
        while len(self._recordings) >= _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        self._recordings[key] = recording
        return recording

    def _not_recorded(self, error: Exception, first: int, last: int) -> None:
        if is_out_of_memory(error):  # maybe not for long; and what is missing may be the others'
            self._recordings.clear()
        else:  # whatever the blocks of some model do that can't be recorded
            logger.warning("decode steps of blocks %d:%d run unrecorded, which is slower: %r", first, last, error)
            self._refused.add((first, last))


def fitting(rows: int, longest: int, cache: KVCache) -> tuple[int, int]:
    """The recorded size for ``rows`` rows (at most the largest) of up to ``longest`` tokens: rows, and pages of each.

    Pages double, since the kernel splits its work by the longest row that there could be.
    """
    pages = -(-longest // cache.page_size)
    return next(height for height in HEIGHTS if height >= rows), min(1 << (pages - 1).bit_length(), cache.pages.count)


def _inputs(rows: Sequence[Row], height: int, width: int, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """What changes from step to step, on the CPU: ``[2, height]`` int64 positions and slots; and int32, one behind the
    other, ends of keys ``[height + 1]``, lengths ``[height]`` and the table of pages ``[height, width]``.

    Rows beyond those given are one token long, in the spare page, all the same.
    """
    size, more = cache.page_size, height - len(rows)
    spare = cache.spare_page
    positions = [row.length for row in rows] + [0] * more
    slots = [row.pages[row.length // size] * size + row.length % size for row in rows] + [spare * size] * more
    lengths = [position + 1 for position in positions]
    ints = [0, *itertools.accumulate(lengths), *lengths]
    for row in rows:
        pages = row.pages[:width]
        ints += pages
        ints += [0] * (width - len(pages))
    ints += [spare] * (width * more)
    return torch.tensor([positions, slots], dtype=torch.int64), torch.tensor(ints, dtype=torch.int32)


class _Buffers:
    """The memory of recorded steps on one device, shared by all of them: they run one after the other."""

    def __init__(self, span: Span, cache: KVCache, device: torch.device) -> None:
        most = HEIGHTS[-1]
        self.hidden = torch.zeros(1, most, span.hidden_size, dtype=span.dtype, device=device)
        self.output = torch.zeros_like(self.hidden)
        self._longs = [torch.zeros(2, height, dtype=torch.int64, device=device) for height in HEIGHTS]
        self._ints = torch.zeros(1 + most * (2 + cache.pages.count), dtype=torch.int32, device=device)
        self._query_ends = torch.arange(most + 1, dtype=torch.int32, device=device)

    def fill(self, hidden: torch.Tensor, longs: torch.Tensor, ints: torch.Tensor) -> None:
        """Take in a step. ``hidden`` ``[1, height, H]`` may be on another device."""
        height = hidden.shape[1]
        self.hidden[:, :height].copy_(hidden, non_blocking=True)
        self._longs[HEIGHTS.index(height)].copy_(longs, non_blocking=True)
        self._ints[: len(ints)].copy_(ints, non_blocking=True)

    def batch(self, cache: KVCache, height: int, width: int) -> Batch:
        """The step in the buffers. It has no rows: blocks whose attention isn't the kernel's can't run it."""
        longs = self._longs[HEIGHTS.index(height)]
        key_ends, lengths, table, _ = self._ints.split(
            (height + 1, height, height * width, len(self._ints) - (2 + width) * height - 1)
        )
        ends = self._query_ends[: height + 1]
        paged = PagedRows(ends, key_ends, lengths, table.view(height, width), 1, width * cache.page_size)
        return Batch(cache=cache, positions=longs[:1], slots=longs[1], run=None, rows=(), paged=paged)
