"""A session as the engine keeps it, and the work that waits for the engine."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from ..cache.kv_cache import Row


@dataclass
class StepTimes:
    """Seconds that a step waited for the engine, and that the batches took that it was in; known with its result."""

    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass(eq=False)
class StepWork:
    """New positions of a session: ``hidden`` ``[rows, T, H]`` from column ``start`` on."""

    hidden: torch.Tensor
    start: int
    hypo_ids: list[int] | None
    prompts: torch.Tensor | None
    future: Future[torch.Tensor]
    names: list[list[bytes]] | None = None  # of each row's pages that this step completes
    arrived_at: float = field(default_factory=time.perf_counter)
    times: StepTimes = field(default_factory=StepTimes)
    begun: bool = False
    done: int = 0  # columns that went through the blocks
    output: torch.Tensor | None = None  # of the columns done, where they are fewer than all

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def columns(self) -> int:
        return self.hidden.shape[1]


@dataclass(frozen=True)
class Prefix:
    """What a session may share with others: the names of each row's first pages, and the ``context`` they are valid in.

    The same name in the same context means the same inputs to the same blocks.
    """

    context: bytes
    names: tuple[tuple[bytes, ...], ...] = ()


@dataclass(eq=False)
class Admission:
    """A session of ``columns`` that waits for ``pages``; the result is how many of its columns are there already."""

    session: RowGroup
    columns: int
    pages: int
    prefix: Prefix | None
    future: Future[int]


@dataclass(eq=False)
class RowGroup:
    """Handle of one session; only the engine changes it. ``position`` counts the columns done. ``pages`` is what it was
    promised, for ``tokens`` in all of its rows, ``context`` that of its :class:`Prefix`, and ``reused`` what it found
    in the cache, until its first step. All of it goes through one ``adapter``, or none.
    """

    first: int
    last: int
    rows: list[Row]
    padding: list[int]
    adapter: str = ""
    position: int = 0
    pages: int = 0
    tokens: int = 0
    context: bytes | None = None
    reused: int = 0
    closed: bool = False
    broken: bool = False
    answered_at: float = 0.0  # when it got its last token's result
    away_s: float | None = None  # how long after that its next step usually comes
    waiting: deque[StepWork] = field(default_factory=deque)

    def row_length(self, row: int, column: int) -> int:
        """How many of the first ``column`` columns of ``row`` are no padding."""
        return max(0, column - self.padding[row])


@dataclass(eq=False)
class DenseWork:
    """A forward, or with ``grad`` a backward, over whole rows that aren't cached. Done some rows at a time."""

    hidden: torch.Tensor
    grad: torch.Tensor | None
    first: int
    last: int
    prompts: torch.Tensor | None
    future: Future[torch.Tensor] | Future[tuple[torch.Tensor, torch.Tensor | None]]
    done: int = 0  # rows
    output: torch.Tensor | None = None
    prompt_grad: torch.Tensor | None = None
    adapter: str = ""
