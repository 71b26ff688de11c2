"""What the RPCs of a node have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hivemind.p2p import P2P

from swarm.errors import LeavingError

from ..engine.cache.handover import tensor_shapes
from ..engine.engine import Engine
from .budget import Budget
from .chunks import ChunkFormat
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
        budget: what each peer may take.
    """

    def __init__(self, p2p: P2P, engine: Engine, served: Served, limits: Limits) -> None:
        self.p2p, self.engine, self.served, self.limits = p2p, engine, served, limits
        self.pusher = Pusher(p2p)
        self.budget = Budget(limits.message_bytes(served.hidden_size))
        self.leaving = False
        self.busy = 0
        self.waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse_if_leaving(self) -> None:
        """Raises LeavingError if no more work is taken."""
        if self.leaving:
            raise LeavingError("this node is shutting down: ask another")

    def chunk_format(self, first: int, last: int, padding: Sequence[int]) -> ChunkFormat:
        """How the cache of the blocks ``first:last`` of a session goes to another node."""
        span = self.engine.span
        return ChunkFormat(tuple(tensor_shapes(span, first, last)), span.dtype, tuple(padding))

    def spawn(self, work: Any) -> None:
        """Runs a coroutine beside the caller, until the node leaves."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Ends all that was spawned."""
        for task in self._tasks:
            task.cancel()
