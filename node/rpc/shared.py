"""What the RPCs of a node have in common."""

from __future__ import annotations

import asyncio
from typing import Any

from swarm.errors import LeavingError

from ..engine.engine import Engine
from .limits import Limits
from .pusher import Pusher
from .requests import Served


class Shared:
    """The engine, what is served by it, and the work under way.

    Attributes:
        served: what is served now; sessions that are open go on with what was served when they began.
        leaving: no more work is taken.
        busy: steps and requests under way.
        waiting: sessions that wait for cache.
    """

    def __init__(self, engine: Engine, served: Served, limits: Limits, pusher: Pusher) -> None:
        self.engine, self.served, self.limits, self.pusher = engine, served, limits, pusher
        self.leaving = False
        self.busy = 0
        self.waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse_if_leaving(self) -> None:
        """Raises LeavingError if no more work is taken."""
        if self.leaving:
            raise LeavingError("this node is shutting down: ask another")

    def spawn(self, work: Any) -> None:
        """Runs a coroutine beside the caller, until the node leaves."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Ends all that was spawned."""
        for task in self._tasks:
            task.cancel()
