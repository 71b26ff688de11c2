"""A swarm without a network: a connection straight to real engines, by default two, each with half of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.engine import Engine
from swarm.node.engine.scheduling.row_group import RowGroup


class InProcessSession:
    """What ``swarm.client.session.session.Session`` promises, one ``Engine.open`` and ``Engine.step`` per half."""

    def __init__(self, connection: InProcessConnection, max_length: int, adapter: str | None) -> None:
        assert adapter is None
        self.position = 0
        self.max_length = max_length
        self.closed = False
        self.steps: list[tuple[int, ...]] = []
        self._connection = connection
        self._halves: list[RowGroup] = []

    @property
    def route(self) -> list[tuple[int, int]]:
        return [(half.first, half.last) for half in self._halves]

    def step(
        self,
        hidden: Tensor,
        *,
        hypo_ids: Tensor | None = None,
        left_padding: Sequence[int] | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        assert not self.closed
        assert self.position + hidden.shape[1] <= self.max_length
        assert self._connection.failure is None, self._connection.failure
        if not self._halves:
            for engine in self._connection.engines:
                self._halves.append(
                    engine.open(
                        rows=hidden.shape[0],
                        first=engine.span.start,
                        last=engine.span.end,
                        left_padding=left_padding or (),
                    )
                )
        self.steps.append(tuple(hidden.shape[:2]))
        result = hidden
        for engine, half in zip(self._connection.engines, self._halves, strict=True):
            result = engine.step(half, result, start=self.position, hypo_ids=hypo_ids).result(timeout=60)
        self.position += hidden.shape[1]
        return result.clone()

    def crop(self, position: int) -> None:
        assert 0 <= position <= self.position
        self.position = position

    def close(self) -> None:
        self.closed = True
        for engine, half in zip(self._connection.engines, self._halves, strict=False):
            engine.close(half)


class InProcessConnection:
    """What ``swarm.client.session.swarm_connection.SwarmConnection`` promises."""

    def __init__(self, path: Path, spans: Sequence[tuple[int, int]] = (), *, max_batch_tokens: int = 512) -> None:
        source = resolve(str(path))
        self.num_blocks = source.num_blocks
        half = self.num_blocks // 2
        self.engines = [
            Engine(
                load_span(source, first, last, dtype=torch.float32, device="cpu", finish=finish_block),
                cache_tokens=4096,
                page_size=4,
                max_batch_tokens=max_batch_tokens,
            )
            for first, last in spans or ((0, half), (half, self.num_blocks))
        ]
        self.sessions: list[InProcessSession] = []
        self.failure: str | None = None
        self.active_adapter: str | None = None
        self.times_closed = 0
        for engine in self.engines:
            engine.start()

    def session(
        self, *, max_length: int, first: int = 0, last: int | None = None, adapter: str | None = None
    ) -> InProcessSession:
        session = InProcessSession(self, max_length, adapter)
        self.sessions.append(session)
        return session

    def forward(self, hidden: Tensor, *, first: int, last: int, adapter: str | None = None) -> Tensor:
        for engine, start, end in self._parts(first, last):
            hidden = engine.forward(hidden, first=start, last=end).result(timeout=60)
        return hidden.clone()  # the engine's are inference tensors; what comes over a network isn't

    def backward(self, hidden: Tensor, grad: Tensor, *, first: int, last: int, adapter: str | None = None) -> Tensor:
        parts = self._parts(first, last)
        inputs = [hidden]
        for engine, start, end in parts[:-1]:
            inputs.append(engine.forward(inputs[-1], first=start, last=end).result(timeout=60))
        for (engine, start, end), given in zip(reversed(parts), reversed(inputs), strict=True):
            grad, _ = engine.backward(given, grad, first=start, last=end).result(timeout=60)
        return grad.clone()

    def close(self) -> None:
        self.times_closed += 1
        if self.times_closed == 1:
            for engine in self.engines:
                engine.stop()

    def steps(self) -> list[list[tuple[int, ...]]]:
        """``(rows, columns)`` of each step of each session so far, which are then forgotten."""
        steps = [session.steps for session in self.sessions]
        self.sessions = [session for session in self.sessions if not session.closed]
        for session in self.sessions:
            session.steps = []
        return steps

    def _parts(self, first: int, last: int) -> list[tuple[Engine, int, int]]:
        parts = [(engine, max(first, engine.span.start), min(last, engine.span.end)) for engine in self.engines]
        return [part for part in parts if part[1] < part[2]]
