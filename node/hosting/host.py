"""What a node serves: a span that comes up, block by block if need be, and may give way to another one."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from swarm.chance import CHANCE
from swarm.compute.memory import trim
from swarm.compute.threads import in_thread
from swarm.errors import ModelError
from swarm.model.skeleton import Span, SpanLoader, fetch_span
from swarm.model.source import ModelSource
from swarm.network import dht
from swarm.network.peer import Peer
from swarm.ranges import as_ranges
from swarm.wire.records import ServerInfo, ServerState

from ..engine.adapters import Adapter, put_adapters
from ..engine.blocks.finish import finish_block
from ..engine.blocks.quantization import Keep, Scheme
from ..engine.deterministic import check, make_deterministic
from ..engine.engine import Engine
from ..engine.gpu.acceleration import Acceleration, accelerate
from ..engine.scheduling.turnstile import open_turnstile
from ..engine.stats import EngineStats
from ..output import Output
from ..rpc.handler import Handler
from ..rpc.limits import Limits
from ..rpc.requests import Served
from ..settings import NodeSettings
from .announcer import Announcer
from .balance import better_start, covered_by_others
from .metrics import serve_metrics
from .placement import Plan, order_of_need
from .sharing import Sharing
from .throughput import measure

logger = logging.getLogger(__name__)
LEAVE_SECONDS = 5.0
_RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Means:
    """With what a node serves: ``devices`` has that of each block of the plan."""

    dtype: torch.dtype
    scheme: Scheme | None
    keep: Keep | None
    plan: Plan
    devices: Sequence[torch.device]
    adapters: Sequence[Adapter] = ()


class Host:
    """Serves a span. If the weights come from peers, it serves what is there of it, a run of blocks that grows. If
    nobody has said which blocks, it moves to others that need it more.

    The engine and its KV cache are made for the whole span at once. Blocks get their weights in another thread, one
    after the other, while those that have theirs run; a block that has none is never run, since :class:`Handler` lets
    nobody have it.

    Args:
        sharing: for weights from peers; one that has begun.
        info: the record, but for what changes.
    """

    def __init__(
        self,
        settings: NodeSettings,
        output: Output,
        peer: Peer,
        source: ModelSource,
        sharing: Sharing | None,
        means: Means,
        info: ServerInfo,
    ) -> None:
        self._settings, self._output, self._peer, self._source = settings, output, peer, source
        self._sharing, self._means, self._info = sharing, means, info
        self._start = self._end = 0
        self._order: list[int] = []
        self._loaded = 0  # of the order
        self._fetching: asyncio.Future[None] | None = None
        self._loader: SpanLoader | None = None
        self._engine: Engine | None = None
        self._handler: Handler | None = None
        self._stats: EngineStats | None = None  # of an engine that has ended
        self._metrics = False

    @property
    def ready(self) -> tuple[int, int]:
        """The blocks that are served."""
        loaded = self._order[: self._loaded]
        return min(loaded), max(loaded) + 1

    async def take(self, start: int, end: int, covered: Sequence[float]) -> None:
        """Brings up the blocks ``start:end``, or some of them. ``covered``: what others serve, for the order.

        Raises:
            ModelError: the weights can't be had or used.
            UsageError: they can't be served as asked.
        """
        self._start, self._end, self._loaded = start, end, 0
        self._order = list(range(start, end))
        self._announcer = self._make_announcer()
        await self._announcer.announce(ServerState.JOINING)
        if self._source.hub is not None:
            await self._download(start, end)
        if self._sharing is not None:
            here = {block for block in self._order if self._sharing.has_block(block)}
            self._order = order_of_need(start, end, here, covered)
            self._fetching = asyncio.ensure_future(self._fetch(self._sharing))
        self._loader = await in_thread(self._make_loader)
        await self._load_next()
        await self._begin()

    async def run(self) -> None:
        """Gets and serves what is missing of the span; then moves whenever that is good for the swarm.

        Raises:
            ModelError, UsageError: a block can't be used.
        """
        await self._grow()
        while self._settings.blocks is None and self._settings.balance_quality:
            start, covered = await self._find_better()
            end = start + len(self._order)
            text = f"Moving from blocks {self._start}:{self._end} to {start}:{end}, which need it more"
            self._output.event("moving", text, blocks=[start, end])
            await self._give_up_span()
            await self.take(start, end, covered)
            await self._grow()

    async def leave(self) -> None:
        """Tells the swarm, finishes what is under way."""
        await asyncio.wait({asyncio.create_task(self._announcer.announce(ServerState.OFFLINE))}, timeout=3.0)
        if self._handler is not None:
            await self._handler.leave(LEAVE_SECONDS)

    async def _grow(self) -> None:
        early = self._loaded < len(self._order)
        while self._loaded < len(self._order):
            await self._load_next()
            assert self._handler is not None
            self._handler.serve(*self.ready)
            await self._announcer.announce(ServerState.ONLINE, ready=self.ready)
            self._say_serving()
        assert self._loader is not None
        assert self._engine is not None
        await in_thread(self._loader.close)
        if early and not self._engine.stats().sessions:  # what was measured while others were loaded is too little
            await self._announcer.announce(ServerState.ONLINE, **await self._measure())

    async def _find_better(self) -> tuple[int, list[float]]:
        """Waits until the node would help more elsewhere: the first block there, and what others serve. Then the
        weights are here, so that it is soon up again."""
        period = self._settings.balance_period
        while True:
            await asyncio.sleep(period * CHANCE.uniform(0.5, 1.5))  # nodes that look at the same time move together
            try:
                start, covered = await self._look()
                if start is None:
                    continue
                await self._prefetch(start)
                again, covered = await self._look()
                if again == start:  # nobody else has moved there meanwhile
                    return start, covered
            except Exception as error:
                logger.warning("could not see to the swarm's balance, will try again: %s", error)

    async def _look(self) -> tuple[int | None, list[float]]:
        source, me, speed = self._source, self._peer.peer_id, self._info.throughput
        records = await dht.fetch(self._peer.dht, source.dht_prefix, source.num_blocks)
        online, planned = (
            covered_by_others(records, me, min_state=state, unknown=speed)
            for state in (ServerState.ONLINE, ServerState.JOINING)
        )
        quality = self._settings.balance_quality
        count, inner = self._end - self._start, source.inner_boundaries
        return better_start(online, planned, self._start, count, speed, quality, inner=inner), planned

    async def _prefetch(self, start: int) -> None:
        end = start + self._end - self._start
        if self._source.hub is not None:
            await self._download(start, end)
        elif self._sharing is not None:
            await self._sharing.fetch(range(start, end))

    async def _download(self, start: int, end: int) -> None:
        with self._output.stage("download", f"Downloading blocks {start}:{end}") as fetched:
            await in_thread(lambda: fetch_span(self._source, start, end, progress=lambda *done: fetched(*done)))

    async def _give_up_span(self) -> None:
        """Leaves, and frees the memory."""
        await self.leave()
        assert self._handler is not None
        assert self._engine is not None
        await self._handler.unregister()
        await in_thread(self._engine.stop)
        self._stats = self._engine.stats()
        self._handler = self._engine = self._loader = None
        gc.collect()  # modules and what they were made by refer to each other
        trim()
        if self._means.devices[0].type == "cuda":
            torch.cuda.empty_cache()

    async def close(self) -> None:
        """Ends what is still going on."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        if self._engine is not None:
            self._engine.stop()

    def _make_announcer(self) -> Announcer:
        source = self._source
        info = dataclasses.replace(self._info, start_block=self._start, end_block=self._end)
        repository = None if source.is_local else source.name
        period = self._settings.update_period
        return Announcer(self._peer, source.dht_prefix, source.num_blocks, repository, info, period=period)

    def _make_loader(self) -> SpanLoader:
        means = self._means
        return SpanLoader(
            self._source,
            self._start,
            self._end,
            dtype=means.dtype,
            device=means.devices,
            finish=self._finish,
            keeper=means.keep,
        )

    def _finish(self, block: nn.Module) -> None:
        finish_block(block, self._means.scheme, deterministic=self._settings.deterministic)

    async def _fetch(self, sharing: Sharing) -> None:
        while True:
            try:
                return await sharing.fetch(self._order)
            except ModelError as error:
                if not self._loaded:
                    raise
                logger.warning("%s. Goes on serving what is here, and tries again", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _load_next(self) -> None:
        """Loads the next block of the order as soon as it is here, and those that follow it and are here too."""
        loader, coming = self._loader, self._order[self._loaded :]
        assert loader is not None
        if self._sharing is not None and self._fetching is not None:
            # of models whose blocks belong together, none is of use before all are there
            arriving = asyncio.ensure_future(self._wait_for(coming if self._source.inner_boundaries else coming[:1]))
            try:
                await asyncio.wait({arriving, self._fetching}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                arriving.cancel()
            if self._fetching.done():
                self._fetching.result()
            missing = [number for number, block in enumerate(coming) if not self._sharing.has_block(block)]
            coming = coming[: missing[0]] if missing else coming
        for first, last in as_ranges(sorted(coming)):
            with self._output.stage("load", f"Loading blocks {first}:{last}") as report:
                for block in range(first, last):
                    report(block - first, last - first)
                    await in_thread(partial(loader.load, block))
                report(last - first, last - first)
            part, adapters = loader.span.part(first, last), self._means.adapters
            if adapters:
                with self._output.stage("adapters", f"Loading adapters {', '.join(self._info.adapters)}"):
                    await in_thread(partial(put_adapters, part, adapters))
            if self._settings.deterministic:
                with self._output.stage("deterministic", "Making sure that results don't depend on the batch"):
                    await in_thread(partial(_make_deterministic, part, self._info.adapters))
        self._loaded += len(coming)

    async def _wait_for(self, blocks: Sequence[int]) -> None:
        assert self._sharing is not None
        for block in blocks:
            await self._sharing.wait_for(block)

    async def _begin(self) -> None:
        """Serves what is loaded."""
        assert self._loader is not None
        source, settings, means, span = self._source, self._settings, self._means, self._loader.span
        tokens = means.plan.cache_tokens
        self._engine = Engine(
            span,
            cache_tokens=tokens,
            max_batch_tokens=settings.max_batch_tokens,
            # recorded steps are padded to sizes that depend on who else is there
            acceleration=Acceleration() if settings.deterministic else await in_thread(lambda: accelerate(span)),
            deterministic=settings.deterministic,
            adapters=self._info.adapters,
            turnstile=open_turnstile(torch.get_num_threads()) if span.device.type == "cpu" else None,
        )
        self._engine.start()
        served = Served(source.dht_prefix, *self.ready, source.hidden_size, means.dtype, self._info.adapters)
        limits = Limits(
            max_length=min(source.max_positions or tokens, tokens),
            step_timeout=settings.idle_timeout,
            idle_seconds=settings.idle_seconds,
        )
        self._handler = Handler(self._peer.p2p, self._engine, served, limits)
        with self._output.stage("warm-up", "Warming up"):
            speed = await self._measure()
        await self._handler.register()
        if settings.metrics_port is not None and not self._metrics:
            self._metrics = True
            serve_metrics(self._stats_now, settings.metrics_port)
        self._announcer.watch(self._engine)
        offer = self._info.offer
        assert offer is not None
        offer = dataclasses.replace(
            offer, started=time.time(), max_rows=limits.max_rows, max_step_tokens=limits.max_step_tokens
        )
        await self._announcer.announce(ServerState.ONLINE, ready=self.ready, offer=offer, **speed)
        self._say_serving()

    async def _measure(self) -> dict[str, Any]:
        engine, hidden = self._engine, self._source.hidden_size
        assert engine is not None
        speed = await in_thread(lambda: measure(engine, *self.ready, hidden))
        self._info = dataclasses.replace(self._info, throughput=speed.inference_rps)
        return {
            "throughput": speed.inference_rps,
            "inference_rps": speed.inference_rps,
            "forward_rps": speed.forward_rps,
        }

    def _stats_now(self) -> EngineStats:
        engine, last = self._engine, self._stats
        if engine is not None:
            return engine.stats()
        assert last is not None  # in between
        return last

    def _say_serving(self) -> None:
        model, peer, join = self._settings.model, self._peer, reachable(self._peer)
        option, argument = ("", "") if self._source.store is None else (" --weights peers", ", weights='peers'")
        (first, last), span = self.ready, f"{self._start}:{self._end}"
        adapters = self._info.adapters
        by = "by --adapter or model.active_adapter"
        adapted = [f"with LoRA adapters, {by}: {', '.join(adapters)}"] if adapters else []
        fields = {"maddrs": list(peer.addresses), "peer_id": peer.peer_id.to_base58(), "blocks": [first, last]}
        if (first, last) != (self._start, self._end):
            text = f"Serving blocks {first}:{last} already, until all of {span} are here. Others join with"
            self._output.event("serving", f"{text} --initial-peers {join}", span=[self._start, self._end], **fields)
            return
        self._output.panel(
            "ready",
            f"Serving blocks {span} of {self._source.name}",
            [
                "Others join with:",
                f"  swarm-node serve {model}{option} --initial-peers {join}",
                "Generate with:",
                f"  swarm chat {model}{option} --initial-peers {join}",
                "or in Python:",
                f"  model = SwarmModelForCausalLM.from_pretrained({model!r}, initial_peers=[{join!r}]{argument})",
                *adapted,
            ],
            model=self._source.name,
            adapters=list(adapters),
            **fields,
        )


def _make_deterministic(span: Span, adapters: Sequence[str]) -> None:
    for block in span.blocks:
        make_deterministic(block)
    check(span, adapters)


def reachable(peer: Peer) -> str:
    """The address that others can use: not the loopback one, if there is another."""
    others = [address for address in peer.addresses if "/127.0.0.1/" not in address and "/::1/" not in address]
    return (others or peer.addresses)[0]
