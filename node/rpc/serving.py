"""What all requests of a node share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from swarm.errors import LeavingError

from ..engine.engine import Engine
from .limits import Limits
from .pusher import Pusher
from .requests import Served


@dataclass(eq=False)
class Serving:
    """What sessions and other requests are served with.

    Attributes:
        leaving: no more work is taken.
        under_way: steps and requests that the engine has.
        waiting: sessions that wait for cache.
        tasks: what runs beside the requests themselves.
    """

    engine: Engine
    served: Served
    limits: Limits
    pusher: Pusher
    leaving: bool = False
    under_way: int = 0
    waiting: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def message_bytes(self) -> int:
        """Bytes of the largest message of a session."""
        return self.limits.message_bytes(self.served.hidden_size)

    def refuse_if_leaving(self) -> None:
        """Raises ``LeavingError`` if so."""
        if self.leaving:
            raise LeavingError("this node is shutting down: ask another one")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` in a task that ends with the node at the latest."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
