"""The gateway's own look at its swarms, shared by all who watch."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

from swarm.network.lock.invitation import Invitation
from swarm.network.lock.key import SwarmKey
from swarm.network.overview import Overview

from .errors import ApiError
from .node_history import NodeHistory
from .served_model import ServedModel

logger = logging.getLogger(__name__)
_LIVELY_SECONDS, _QUIET_SECONDS = 1.0, 10.0
_PATIENCE_SECONDS = 8.0
_WATCHED_SECONDS = 15.0  # after a question it stays lively for so long


class SwarmWatch:
    """Looks at most once a second while somebody watches, and every ten seconds otherwise, for the history's sake.

    A look that takes long is followed by as long a pause. Lives in one event loop.

    Args:
        initial_peers: by which nodes may join.
        keys: of a locked swarm.
        shows_key: whoever can look at the swarm here may join it.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        initial_peers: Sequence[str],
        keys: Sequence[SwarmKey] = (),
        *,
        shows_key: bool = False,
    ) -> None:
        self._models, self._peers, self._locked = models, initial_peers, bool(keys)
        self._invitation = Invitation(tuple(initial_peers), keys[0]).line() if keys and shows_key else None
        self.history = NodeHistory()
        self._overviews: dict[str, Overview] = {}
        self._encoded = b""
        self._asked_at = 0.0
        self._looked_at = float("-inf")
        self._look = asyncio.Event()  # somebody wants a fresh look
        self._news = asyncio.Condition()
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends it, and the streams of all who watch."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()
        async with self._news:
            self._news.notify_all()

    async def latest(self) -> bytes:
        """All models' overviews as JSON, at most a second old unless the look takes longer.

        Raises:
            ApiError: 503, there was no look for some seconds.
        """
        self._ask()
        if time.monotonic() - self._looked_at > _LIVELY_SECONDS:
            try:
                await asyncio.wait_for(self._next(), _PATIENCE_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(503, "the swarm can't be looked at: the gateway's log says why", retry_after=5) from None
        return self._encoded

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Every look as it comes, the last one at once."""
        if self._encoded:
            yield self._encoded
        while not self._ended:
            self._ask()
            await self._next()
            if not self._ended:
                yield self._encoded

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        self._look.set()

    async def _next(self) -> None:
        async with self._news:
            if not self._ended:
                await self._news.wait()

    async def _run(self) -> None:
        while True:
            begin = time.monotonic()
            try:
                await self._once()
            except Exception as error:
                logger.warning("could not look at the swarm, will try again: %s", error)
            took = time.monotonic() - begin
            await asyncio.sleep(max(_LIVELY_SECONDS - took, took))
            if time.monotonic() - self._asked_at > _WATCHED_SECONDS:
                self._look.clear()
                try:
                    await asyncio.wait_for(self._look.wait(), _QUIET_SECONDS)
                except asyncio.TimeoutError:
                    continue

    async def _once(self) -> None:
        for model in self._models.values():
            seen = await model.overview(self._overviews.get(model.id))
            self._overviews[model.id] = seen
            self.history.add(time.time(), seen)
        self._encoded = await asyncio.to_thread(self._encode)  # 30 ms for 500 nodes, which tokens shall not wait for
        self._looked_at = time.monotonic()
        async with self._news:
            self._news.notify_all()

    def _encode(self) -> bytes:
        models = [overview.to_dict() for overview in self._overviews.values()]
        join = {model.id: [model.name, *self._peers] for model in self._models.values()}
        said: dict[str, object] = {"models": models, "join": join}
        if self._locked:
            said["invitation"] = self._invitation
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
