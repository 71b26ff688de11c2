"""Runs what was chosen for one turn of the engine: columns of several works as one batch, and their outputs apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.compute.transfer import to_device, to_host
from swarm.model.span import Span

from . import executor
from .attention.adapter_tokens import adapter_tokens
from .attention.batch import pack
from .cache.kv_cache import KVCache, Row
from .cache.states import StateStore
from .deterministic import columns_per_piece
from .executor import PlacedPrompts
from .gpu.static_decode import StaticDecode
from .scheduling.scheduler import DECODE_COLUMNS
from .scheduling.session import RowGroup, StepWork


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

    def run(
        self, chosen: Sequence[tuple[RowGroup, StepWork, int]], first: int, last: int
    ) -> tuple[list[torch.Tensor], int, int]:
        """The next ``columns`` of each of ``chosen`` through the blocks ``first:last``.

        Returns the outputs ``[rows, columns, H]`` of each, and how many tokens of prefill and of decode there were.
        """
        span = self._span
        rows: list[tuple[Row, int]] = []
        inputs: list[torch.Tensor] = []  # [1, tokens, H] each
        cuts: list[list[int]] = []  # tokens of each row of each work
        pieces: list[tuple[int, int]] = []
        prefill = decode = 0
        for session, work, columns in chosen:
            begin = work.start + work.done
            part = work.hidden if columns == work.columns else work.hidden[:, work.done : work.done + columns]
            new = [
                session.row_length(row, begin + columns) - sequence.length for row, sequence in enumerate(session.rows)
            ]
            rows.extend(zip(session.rows, new, strict=True))
            pieces.extend((padding, columns_per_piece(len(new))) for padding in session.padding)
            cuts.append(new)
            total = sum(new)
            if total == columns * len(new):
                inputs.append(part if len(new) == 1 else part.reshape(1, total, span.hidden_size))
            else:
                inputs.extend(part[row : row + 1, columns - count :] for row, count in enumerate(new))
            if work.columns <= DECODE_COLUMNS:
                decode += total
            else:
                prefill += total
        if not prefill + decode:
            return [self._empty(len(new), columns) for new, (_, _, columns) in zip(cuts, chosen, strict=True)], 0, 0
        flat = inputs[0] if len(inputs) == 1 else torch.cat([part.to(span.dtype) for part in inputs], 1)
        prompts = self._place(*chosen[0][1:], cuts[0])
        adapters = adapter_tokens((one[0].adapter, sum(new)) for one, new in zip(chosen, cuts, strict=True))
        output = None
        if self._decode is not None and prompts is None and not adapters:
            decoded = self._decode.run(rows, flat[0], first, last)
            output = None if decoded is None else decoded[None]
        if output is None:
            batch = pack(
                self._cache,
                rows,
                span.device,
                pieces=pieces if self._deterministic else None,
                states=tuple(self._states.of(row) for row, count in rows if count) if self._states is not None else (),
                adapters=adapters,
            )
            hidden = to_device(flat, span.device, span.dtype)
            output = executor.run_blocks(span, hidden, batch, first=first, last=last, prompts=prompts)
            output = output if output.is_cpu else to_host(output)
        outputs: list[torch.Tensor] = []
        offset = 0
        for (_, _, columns), new in zip(chosen, cuts, strict=True):
            total = sum(new)
            mine = output if total == output.shape[1] else output.narrow(1, offset, total)
            offset += total
            if total == columns * len(new):
                outputs.append(mine if len(new) == 1 else mine.reshape(len(new), columns, -1))
                continue
            padded = self._empty(len(new), columns)
            for row, piece in enumerate(mine[0].split(new)):
                padded[row, columns - len(piece) :] = piece
            outputs.append(padded)
        for sequence, count in rows:
            sequence.length += count
        return outputs, prefill, decode

    def _place(self, work: StepWork, columns: int, new: Sequence[int]) -> PlacedPrompts | None:
        """The prompts of ``work``, which runs alone, for its columns in this turn."""
        if work.prompts is None:
            return None
        prompts = work.prompts.to(self._span.device, self._span.dtype)
        where: list[int] = []
        cells: list[tuple[int, int]] = []
        offset = 0
        for row, count in enumerate(new):
            skipped = columns - count
            for column in range(skipped, min(columns, prompts.shape[2] - work.done)):
                where.append(offset + column - skipped)
                cells.append((row, work.done + column))
            offset += count
        return PlacedPrompts(prompts, where, [row for row, _ in cells], [column for _, column in cells])

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, self._span.hidden_size, dtype=self._span.dtype)
