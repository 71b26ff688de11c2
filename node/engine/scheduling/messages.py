"""What other threads tell the engine's, a class each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .row_group import RowGroup
from .work import DenseWork, StepWork, fail


@dataclass(frozen=True)
class Prefix:
    """What a session may share with others: the names of each row's first pages, and the ``context`` they are valid in.

    The same name in the same context means the same inputs to the same blocks.
    """

    context: bytes
    names: tuple[tuple[bytes, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Admit:
    """Promise ``session`` ``pages`` for its ``columns``; the result is how many of these are there already. If there is
    no room it may ``wait``."""

    session: RowGroup
    columns: int
    pages: int
    prefix: Prefix | None
    wait: bool
    future: Future[int]


@dataclass(frozen=True, slots=True)
class Step:
    """``work`` is what ``session`` does next, after all that it has waiting."""

    session: RowGroup
    work: StepWork


@dataclass(frozen=True, slots=True)
class Dense:
    """``work`` of no session."""

    work: DenseWork


@dataclass(frozen=True, slots=True)
class Close:
    """Nobody needs ``session`` any more."""

    session: RowGroup


@dataclass(frozen=True, slots=True)
class Visit:
    """``work`` that takes a moment, on what only the engine's thread may touch."""

    work: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        """Does it, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.work())
            except Exception as error:
                self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Stop:
    """Wakes the thread to see that it is to end."""


Message = Admit | Step | Dense | Close | Visit | Stop


def refuse(message: Message, error: Exception) -> None:
    """Tell whoever waits for ``message``, if anybody does, that nothing comes of it."""
    if isinstance(message, Step | Dense):
        fail(message.work.future, error)
    elif isinstance(message, Admit | Visit):
        fail(message.future, error)
