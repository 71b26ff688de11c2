"""One span that is served: its engine, its RPC handler and its records in the DHT."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import torch

from swarm.compute.threads import in_thread
from swarm.model.span import Span
from swarm.network.clock import CLOCK
from swarm.wire.records import ServerInfo, ServerState

from ..engine.engine import Engine
from ..engine.gpu.acceleration import Acceleration, accelerate
from ..engine.scheduling.turnstile import open_turnstile
from ..engine.stats import EngineStats
from ..rpc.handler import Handler
from ..rpc.limits import Limits
from ..rpc.requests import Served
from .announcer import Announcer
from .means import Means
from .placement.throughput import measure

LEAVE_SECONDS = 5.0
_HANDOVER_SECONDS = 10.0  # all that a leaving node takes is to be less than supervisors wait, mostly 30
_GOODBYE_SECONDS = 3.0


class Serving:
    """Serves what is loaded of the blocks ``start:end``: :meth:`join`, :meth:`start`, :meth:`announce` as often as more
    is loaded, :meth:`leave`, :meth:`stop`.

    The engine and its KV cache are made for the whole span at once. A block that isn't loaded is never run, since
    :class:`Handler` lets nobody have it.

    Args:
        info: the record, but for what changes.
    """

    def __init__(self, means: Means, info: ServerInfo, start: int, end: int) -> None:
        source, period = means.source, means.settings.update_period
        self._means, self.throughput = means, info.throughput
        self._offer = info.offer
        info = dataclasses.replace(info, start_block=start, end_block=end)
        repository = None if source.is_local else source.name
        self._announcer = Announcer(means.peer, source.dht_prefix, source.num_blocks, repository, info, period=period)
        self.engine: Engine | None = None
        self._handler: Handler | None = None

    async def join(self) -> None:
        """Tells the swarm that these blocks are about to be served."""
        await self._announcer.announce(ServerState.JOINING)

    async def start(self, span: Span, ready: tuple[int, int]) -> dict[str, Any]:
        """Starts the engine, measures it, takes requests for the blocks ``ready``. Returns what :meth:`announce` is to
        tell of it."""
        means, settings = self._means, self._means.settings
        tokens = means.plan.cache_tokens
        self.engine = Engine(
            span,
            cache_tokens=tokens,
            max_batch_tokens=settings.max_batch_tokens,
            # recorded steps are padded to sizes that depend on who else is there
            acceleration=Acceleration() if settings.deterministic else await in_thread(lambda: accelerate(span)),
            deterministic=settings.deterministic,
            adapters=means.adapter_names,
            turnstile=open_turnstile(torch.get_num_threads()) if span.device.type == "cpu" else None,
        )
        self.engine.start()
        limits = Limits(
            max_length=min(means.source.max_positions or tokens, tokens),
            step_timeout=settings.idle_timeout,
            idle_seconds=settings.idle_seconds,
        )
        served = Served(means.source.dht_prefix, *ready, span.hidden_size, means.dtype, means.adapter_names)
        self._handler = Handler(means.peer.p2p, self.engine, served, limits)
        with means.output.stage("warm-up", "Warming up"):
            speed = await self.measure(ready)
        await self._handler.register()
        self._announcer.watch(self.engine)
        assert self._offer is not None
        offer = dataclasses.replace(
            self._offer, started=CLOCK.now(), max_rows=limits.max_rows, max_step_tokens=limits.max_step_tokens
        )
        return {"offer": offer, **speed}

    async def announce(self, ready: tuple[int, int], **changes: object) -> None:
        """Takes requests for the blocks ``ready`` from now on and tells the swarm, with what else has changed."""
        assert self._handler is not None
        self._handler.serve(*ready)
        await self._announcer.announce(ServerState.ONLINE, ready=ready, **changes)

    async def announce_again(self) -> None:
        """Tells the swarm anew what it was told last, after it could not reach this node: clients ask it at once."""
        await self._announcer.renew()

    async def measure(self, ready: tuple[int, int]) -> dict[str, float]:
        """The speed of the blocks ``ready`` in rows per second, as it stands in the record."""
        engine = self.engine
        assert engine is not None
        speed = await in_thread(lambda: measure(engine, *ready, engine.span.hidden_size))
        self.throughput = speed.inference_rps
        return {"throughput": speed.inference_rps, **dataclasses.asdict(speed)}

    async def take_back(self) -> None:
        """Tells the swarm that this span is not served, if it has been told otherwise."""
        if self._announcer.told:
            goodbye = asyncio.create_task(self._announcer.announce(ServerState.OFFLINE))
            await asyncio.wait({goodbye}, timeout=_GOODBYE_SECONDS)

    async def leave(self) -> None:
        """Tells the swarm, finishes what is under way, and hands over what sessions have in the cache."""
        await self.take_back()
        if self._handler is not None:
            await self._handler.leave(LEAVE_SECONDS, _HANDOVER_SECONDS)

    async def stop(self) -> EngineStats:
        """After :meth:`leave`: another one may take this one's place. Returns the engine's last figures."""
        assert self._handler is not None
        assert self.engine is not None
        await self._handler.unregister()
        await in_thread(self.engine.stop)
        return self.engine.stats()
