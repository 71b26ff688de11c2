"""Messages that nothing comes of, and futures that may have ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from swarm.errors import LeavingError
from swarm.node.engine.scheduling.messages import Admit, Close, Dense, Message, Step, Stop, refuse
from swarm.node.engine.scheduling.row_group import RowGroup
from swarm.node.engine.scheduling.work import DenseWork, StepWork, fail

SESSION = RowGroup(0, 1, [], [])
HIDDEN = torch.zeros(1, 1, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda future: Step(SESSION, StepWork(HIDDEN, 0, None, None, future)),
        lambda future: Dense(DenseWork(HIDDEN, None, 0, 1, None, future)),
        lambda future: Admit(SESSION, 1, 1, None, False, future),
    ],
)
def test_who_waits_for_a_message_hears_that_nothing_comes_of_it(make: Callable[[Future[Any]], Message]) -> None:
    future: Future[Any] = Future()
    refuse(make(future), LeavingError("going"))
    with pytest.raises(LeavingError):
        future.result(timeout=0)


def test_nobody_waits_for_the_others() -> None:
    for message in (Close(SESSION), Stop()):
        refuse(message, LeavingError("going"))


def test_a_future_ends_once() -> None:
    running, cancelled, ended = Future[int](), Future[int](), Future[int]()
    running.set_running_or_notify_cancel()
    cancelled.cancel()
    ended.set_result(1)
    for future in (running, cancelled, ended, running):
        fail(future, LeavingError("going"))
    assert isinstance(running.exception(), LeavingError)
    assert cancelled.cancelled()
    assert ended.result() == 1
