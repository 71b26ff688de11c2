"""Work that waits for the engine, and how far it is."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from .scheduler import DECODE_COLUMNS


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

    def __post_init__(self) -> None:
        self.rows, self.columns, _ = self.hidden.shape  # once, as asking a tensor takes a while
        self.decodes = self.columns <= DECODE_COLUMNS


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


def fail(future: Future[Any], error: Exception) -> None:
    """End ``future`` with ``error``, unless it has ended or was cancelled."""
    if future.running() or (not future.done() and future.set_running_or_notify_cancel()):
        future.set_exception(error)
