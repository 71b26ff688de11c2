"""Keeps a node's records in the DHT fresh."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from contextvars import Context
from functools import partial

from swarm.chance import CHANCE
from swarm.network import dht
from swarm.network.clock import CLOCK
from swarm.network.nat.reachability import RELAY, UNREACHABLE, Reached
from swarm.network.peer import Peer, ping
from swarm.wire.records import ServerInfo, ServerState

from ..engine.engine import Engine

logger = logging.getLogger(__name__)
_NEWER_SECONDS = 0.001
_MAX_PINGED = 5
_REFUSED_SECONDS = 5.0  # until records that were not taken are announced again
_REFUSALS = 3  # in a row, and a person is told


class Announcer:
    """Announces a span every ``period`` seconds, and at once when something changes, with what is free at that time.

    Args:
        repository: the model's id on the Hub, for lists of models.
        info: the first record; it names the span.

    Attributes:
        told: whether the swarm has been told that the node is there, and not yet that it has left.
    """

    def __init__(
        self,
        peer: Peer,
        prefix: str,
        num_blocks: int,
        repository: str | None,
        info: ServerInfo,
        *,
        period: float,
    ) -> None:
        assert info.start_block is not None
        assert info.end_block is not None
        self._peer, self._prefix, self._num_blocks, self._repository = peer, prefix, num_blocks, repository
        peer.p2p.find_ways = partial(dht.fetch, peer.dht, prefix, num_blocks)
        self._ready = info.start_block, info.end_block
        self._info, self._period = info, period
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._refused = 0  # times in a row
        self._turn = asyncio.Lock()
        self._until = 0.0  # when the records end that were announced last
        self.told = False

    def watch(self, engine: Engine) -> None:
        """From now on the records tell the engine's free KV cache and its sessions."""
        self._engine = engine

    async def announce(self, state: ServerState, *, ready: tuple[int, int] | None = None, **changes: object) -> None:
        """Announces ``state`` and the changed fields of the record now, and keeps it fresh from then on. ``ready``:
        the blocks to which an online state applies, if not to all."""
        if state == ServerState.ONLINE:
            await self._peer.reach.settled()
        async with self._turn:
            await self._announce(state, ready, changes)

    async def _announce(self, state: ServerState, ready: tuple[int, int] | None, changes: Mapping[str, object]) -> None:
        self._ready = ready or self._ready
        self._info = dataclasses.replace(self._info, state=state, **changes)  # type: ignore[arg-type]
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.told = state != ServerState.OFFLINE
        self._note(await self._store())
        if state != ServerState.OFFLINE:
            # in no context of who calls: after a restart of the daemon that is one which waits for nothing
            self._task = Context().run(asyncio.ensure_future, self._repeat())

    async def renew(self) -> None:
        """Announces the same again now, as of a node that has just started; nothing, if nothing is announced."""
        async with self._turn:
            if self._task is not None:
                offer = self._info.offer and dataclasses.replace(self._info.offer, started=CLOCK.now())
                await self._announce(self._info.state, None, {"offer": offer})

    async def _repeat(self) -> None:
        while True:
            await self._peer.lookout.pause(min(self._period, _REFUSED_SECONDS) if self._refused else self._period)
            try:
                self._info = dataclasses.replace(self._info, next_pings=await self._ping_next())
                self._note(await self._store())
            except Exception as error:
                logger.warning("could not announce the blocks, will try again: %s", error)

    def _note(self, taken: bool) -> None:
        self._refused = 0 if taken else self._refused + 1
        if self._refused == _REFUSALS:  # one alone: two records have crossed, or a peer has just gone
            logger.warning(
                "other peers do not take this node's records, so it may not be found: see whether this machine is "
                "online and its clock right"
            )

    async def _store(self) -> bool:
        """Whether the swarm has taken all records."""
        info = self._info
        if self._engine is not None and info.offer is not None:
            stats = self._engine.stats()
            offer = dataclasses.replace(info.offer, sessions=stats.sessions)
            info = dataclasses.replace(info, cache_tokens_left=stats.cache_tokens_free, offer=offer)
        info = told_reach(info, self._peer.reach.now)
        # outlives two lost announcements, and what was announced before, also if the clock was set back since
        ttl = max(60.0, 3 * self._period, self._until - CLOCK.now() + _NEWER_SECONDS)
        self._until = CLOCK.now() + ttl
        taken = [
            await dht.announce(self._peer.dht, self._prefix, first, last, record, ttl=ttl)
            for first, last, record in records_of(info, self._ready)
        ]
        if info.state == ServerState.ONLINE and not self._prefix.startswith("_"):
            await dht.announce_model(self._peer.dht, self._prefix, self._num_blocks, self._repository, ttl=ttl)
        return all(taken)

    async def _ping_next(self) -> dict[str, float]:
        """Round-trip seconds to some of the peers that may follow this one on a route."""
        blocks = await dht.fetch(self._peer.dht, self._prefix, self._num_blocks)
        following = blocks[self._ready[0] + 1 : self._ready[1] + 1]
        peers = {peer_id for servers in following for peer_id in servers if peer_id != self._peer.peer_id}
        chosen = CHANCE.sample(sorted(peers), min(_MAX_PINGED, len(peers)))
        times = await asyncio.gather(*(ping(self._peer, peer_id, 3.0) for peer_id in chosen))
        return {
            peer_id.to_base58(): seconds for peer_id, seconds in zip(chosen, times, strict=True) if seconds is not None
        }


def told_reach(info: ServerInfo, reached: Reached) -> ServerInfo:
    """A record that says how the node is reached. Of a node that nobody can reach, no blocks are online."""
    state = ServerState.JOINING if (info.state, reached.how) == (ServerState.ONLINE, UNREACHABLE) else info.state
    offer = info.offer and dataclasses.replace(info.offer, reached=reached.how, relays=reached.relays)
    return dataclasses.replace(info, state=state, offer=offer, using_relay=reached.how == RELAY)


def records_of(info: ServerInfo, ready: tuple[int, int]) -> list[tuple[int, int, ServerInfo]]:
    """The records of a span, each with the blocks ``(start, end)`` under which it is stored. While it is online, the
    blocks that aren't ``ready`` yet are announced as joining, so that other nodes choose others."""
    start, end = info.start_block, info.end_block
    assert start is not None
    assert end is not None
    if info.state != ServerState.ONLINE:
        return [(start, end, info)]
    first, last = ready
    serving = dataclasses.replace(info, start_block=first, end_block=last)
    coming = dataclasses.replace(info, state=ServerState.JOINING)
    records = [(first, last, serving), (start, first, coming), (last, end, coming)]
    return [record for record in records if record[0] < record[1]]
