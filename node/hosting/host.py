"""A running node, which ``server.py`` starts and ``life.py`` ends: it serves a span, and moves on to another one."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import Sequence

import torch

from swarm.compute.memory import trim
from swarm.wire.records import ServerInfo

from ..engine.engine import Engine
from ..engine.stats import EngineStats
from .invitation import say_serving
from .life import together
from .means import Means
from .metrics import serve_metrics
from .moving import wait_for_better
from .serving import Serving
from .weights.loading import Loading


class Host:
    """Serves a span. If the weights come from peers, it serves what is there of it, a run of blocks that grows. If
    nobody has said which blocks, it moves to others that need it more.

    A span is loaded by a :class:`Loading` and served by a :class:`Serving`, each made anew after a move.

    Args:
        info: the record, but for what changes.
    """

    def __init__(self, means: Means, info: ServerInfo) -> None:
        self._means, self._info = means, info
        self._start = self._end = 0
        self._loading: Loading | None = None
        self._serving: Serving | None = None
        self._stats: EngineStats | None = None  # of an engine that has ended
        self._metrics = False
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        means.peer.after_restart.append(self._announce_again)

    async def take(self, start: int, end: int, covered: Sequence[float]) -> None:
        """Brings up the blocks ``start:end``, or some of them. ``covered``: what others serve, for the order.

        Raises:
            ModelError: the weights can't be had or used.
            UsageError: they can't be served as asked.
            ConnectError: the port for metrics is taken.
        """
        self._start, self._end = start, end
        serving = self._serving = Serving(self._means, self._info, start, end)
        await serving.join()
        loading = self._loading = Loading(self._means, start, end, covered)
        await loading.begin()
        await loading.load_next()
        changes = await serving.start(loading.span, loading.ready)
        assert serving.engine is not None
        self._watch(serving.engine)
        port = self._means.settings.metrics_port
        if port is not None and not self._metrics:
            self._metrics = True
            serve_metrics(self._stats_now, self._means.peer, self._means.settings.peer.host, port)
        await serving.announce(loading.ready, **changes)
        say_serving(self._means, start, end, loading.ready)

    async def run(self) -> None:
        """What a node does until it is told to stop: it gets and serves what is missing of the span; then it moves
        whenever that is good for the swarm. A node leaves the swarm and ends when this raises.

        Raises:
            ModelError, UsageError: a block can't be used.
            DaemonError: the network daemon is lost.
            RemoteError: the engine broke.
        """
        await together(self._work(), self._means.peer.watch_daemon(), self._broken)

    async def _work(self) -> None:
        await self._grow()
        while self._means.settings.blocks is None and self._means.settings.balance_quality:
            await self._move()

    async def leave(self) -> None:
        """Tells the swarm, finishes what is under way."""
        assert self._serving is not None
        await self._serving.leave()

    async def close(self) -> None:
        """Ends what is still going on. A node that ends while it starts takes back that it was about to serve."""
        if self._serving is not None:
            await self._serving.take_back()
        if self._loading is not None:
            await self._loading.give_up()
        if self._serving is not None and self._serving.engine is not None:
            self._serving.engine.stop()

    def _watch(self, engine: Engine) -> None:
        """Has :meth:`run` raise what an engine breaks with."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            error = engine.ended.exception()
            if error is not None and not self._broken.done():
                self._broken.set_exception(error)

        engine.ended.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(tell))

    async def _announce_again(self) -> None:
        if self._serving is not None:
            await self._serving.announce_again()

    async def _grow(self) -> None:
        loading, serving = self._loading, self._serving
        assert loading is not None
        assert serving is not None
        assert serving.engine is not None
        early = not loading.done
        while not loading.done:
            await loading.load_next()
            await serving.announce(loading.ready)
            say_serving(self._means, self._start, self._end, loading.ready)
        await loading.close()
        if early and not serving.engine.stats().sessions:  # what was measured while others were loaded is too little
            await serving.announce(loading.ready, **await serving.measure(loading.ready))

    async def _move(self) -> None:
        """Waits until other blocks need the node more, and goes over to them."""
        assert self._serving is not None
        self._info = dataclasses.replace(self._info, throughput=self._serving.throughput)
        start, covered = await wait_for_better(self._means, self._start, self._end, self._info.throughput)
        end = start + self._end - self._start
        text = f"Moving from blocks {self._start}:{self._end} to {start}:{end}, which need it more"
        self._means.output.event("moving", text, blocks=[start, end])
        await self._give_up_span()
        await self.take(start, end, covered)
        await self._grow()

    async def _give_up_span(self) -> None:
        """Leaves, and frees the memory."""
        await self.leave()
        assert self._serving is not None
        self._stats = await self._serving.stop()
        self._serving = self._loading = None
        gc.collect()  # modules and what they were made by refer to each other
        trim()
        if self._means.devices[0].type == "cuda":
            torch.cuda.empty_cache()

    def _stats_now(self) -> EngineStats:
        engine = self._serving.engine if self._serving is not None else None
        stats = engine.stats() if engine is not None else self._stats
        assert stats is not None  # while it moves there are the last engine's
        return stats
