"""Runs what was chosen for one turn of the engine: columns of several works as one batch, and their outputs apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from swarm.compute.transfer import to_device, to_host
from swarm.model.span import Span

from . import executor
from .attention.adapter_tokens import adapter_tokens
from .attention.batch import pack
from .cache.kv_cache import KVCache, Row
from .cache.states import StateStore
from .executor import PlacedPrompts
from .gpu.static_decode import StaticDecode
from .scheduling.scheduler import columns_per_piece
from .scheduling.step_queue import Take


class TurnOutput(NamedTuple):
    """``outputs`` ``[rows, columns, H]`` of each take, and how many tokens of prefill and of decode were in them."""

    outputs: list[torch.Tensor]
    prefill: int
    decode: int


class _Cut(NamedTuple):
    """A take, how many of its columns are no padding by row, and the sum of these."""

    take: Take
    new: list[int]
    total: int


class TurnRunner:
    """Works of sessions that are ready for them (their rows have pages) through the blocks of ``span``."""

    def __init__(
        self,
        span: Span,
        cache: KVCache,
        states: StateStore | None,
        *,
        decode: StaticDecode | None = None,
        deterministic: bool = False,
    ) -> None:
        self._span = span
        self._cache = cache
        self._states = states
        self._decode = decode
        self._deterministic = deterministic

    def run(self, takes: Sequence[Take]) -> TurnOutput:
        """``takes`` through the blocks that all of them are for. If it fails, their rows are as before."""
        cuts = [_cut(take) for take in takes]
        rows: list[tuple[Row, int]] = []
        prefill = decode = 0
        for take, new, total in cuts:
            rows.extend(zip(take.session.rows, new, strict=True))
            if take.work.decodes:
                decode += total
            else:
                prefill += total
        if not prefill + decode:
            return TurnOutput([self._empty(take) for take in takes], 0, 0)
        with self._kept_states([row for row, count in rows if count]):
            outputs = self._divide(self._compute(cuts, rows), cuts)
        for row, count in rows:
            row.length += count
        return TurnOutput(outputs, prefill, decode)

    @contextmanager
    def _kept_states(self, rows: Sequence[Row]) -> Iterator[None]:
        """If it fails, the states of ``rows``, of which some blocks have new ones by then, are the old ones again."""
        states = [] if self._states is None else [self._states.of(row) for row in rows]
        before = [dict(each) for each in states]
        try:
            yield
        except BaseException:
            for now, old in zip(states, before, strict=True):
                now.clear()
                now.update(old)
            raise

    def _compute(self, cuts: Sequence[_Cut], rows: list[tuple[Row, int]]) -> torch.Tensor:
        """The output ``[1, tokens, H]`` of all takes, on the CPU; ``rows`` with how many new tokens each has."""
        span, session = self._span, cuts[0].take.session
        parts = [part for cut in cuts for part in _inputs(cut)]
        flat = parts[0] if len(parts) == 1 else torch.cat([part.to(span.dtype) for part in parts], 1)
        prompts = self._place(cuts[0])
        adapters = adapter_tokens([(cut.take.session.adapter, cut.total) for cut in cuts])
        if self._decode is not None and prompts is None and not adapters:
            decoded = self._decode.run(rows, flat[0], session.first, session.last)
            if decoded is not None:
                return decoded[None]
        batch = pack(
            self._cache,
            rows,
            span.device,
            pieces=_pieces(cuts) if self._deterministic else None,
            states=tuple(self._states.of(row) for row, count in rows if count) if self._states is not None else (),
            adapters=adapters,
        )
        hidden = to_device(flat, span.device, span.dtype)
        output = executor.run_blocks(span, hidden, batch, first=session.first, last=session.last, prompts=prompts)
        return output if output.is_cpu else to_host(output)

    def _divide(self, output: torch.Tensor, cuts: Sequence[_Cut]) -> list[torch.Tensor]:
        """``output`` ``[1, tokens, H]`` as ``[rows, columns, H]`` of each take; zero where there is padding."""
        outputs: list[torch.Tensor] = []
        offset = 0
        for take, new, total in cuts:
            mine = output if total == output.shape[1] else output.narrow(1, offset, total)
            offset += total
            if total == take.columns * len(new):
                outputs.append(mine if len(new) == 1 else mine.reshape(len(new), take.columns, output.shape[2]))
                continue
            padded = self._empty(take)
            for row, piece in enumerate(mine[0].split(new)):
                padded[row, take.columns - len(piece) :] = piece
            outputs.append(padded)
        return outputs

    def _place(self, cut: _Cut) -> PlacedPrompts | None:
        """The prompts of a take, which runs alone if it has some, for its columns in this turn."""
        work, columns = cut.take.work, cut.take.columns
        if work.prompts is None:
            return None
        prompts = work.prompts.to(self._span.device, self._span.dtype)
        where: list[int] = []
        cells: list[tuple[int, int]] = []
        offset = 0
        for row, count in enumerate(cut.new):
            skipped = columns - count
            for column in range(skipped, min(columns, prompts.shape[2] - work.done)):
                where.append(offset + column - skipped)
                cells.append((row, work.done + column))
            offset += count
        return PlacedPrompts(prompts, where, [row for row, _ in cells], [column for _, column in cells])

    def _empty(self, take: Take) -> torch.Tensor:
        return torch.zeros(take.work.rows, take.columns, self._span.hidden_size, dtype=self._span.dtype)


def _cut(take: Take) -> _Cut:
    session, end = take.session, take.work.start + take.work.done + take.columns
    new = [session.row_length(row, end) - sequence.length for row, sequence in enumerate(session.rows)]
    return _Cut(take, new, sum(new))


def _inputs(cut: _Cut) -> Sequence[torch.Tensor]:
    """The take's tokens that are no padding, in parts of ``[1, tokens, H]``."""
    (_, work, columns), new, total = cut
    part = work.hidden if columns == work.columns else work.hidden[:, work.done : work.done + columns]
    if total == columns * len(new):
        return (part if len(new) == 1 else part.reshape(1, total, part.shape[2]),)
    return [part[row : row + 1, columns - count :] for row, count in enumerate(new)]


def _pieces(cuts: Sequence[_Cut]) -> list[tuple[int, int]]:
    """The padding of each row, and at which multiples it is cut."""
    return [(padding, columns_per_piece(len(cut.new))) for cut in cuts for padding in cut.take.session.padding]
