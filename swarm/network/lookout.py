"""Looking for the peers that are missing. hivemind drops a peer after one call that fails, and never asks again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

from hivemind.dht import DHTNode
from hivemind.p2p import P2P

from ..wire.peer_id import read_peer_id
from .clock import CLOCK, Instant, measure_skews, stood_still, was_set
from .daemon_calls import connect, find_addresses
from .known_peers import MAX_CONTACTS, Asked, Contact, KnownPeers, whom_to_ask

logger = logging.getLogger(__name__)
_TICK_SECONDS = 1.0
_LEARN_SECONDS = 60.0  # between two looks where all the peers listen
_CLOCK_SECONDS = 60.0  # between two looks at others' clocks
_ASK_SECONDS = 5.0
_AT_A_TIME = 8  # peers that are asked, for their time too


class Connected(Protocol):
    """What looks through a daemon and a DHT node, which may be replaced."""

    p2p: P2P
    dht: DHTNode


class Lookout:
    """Asks for the known peers, those that are missing most often, and learns new ones. Says when nobody is left.

    Attributes:
        alone: whether no other peer is there now, though somebody was or should be.
    """

    def __init__(self, of: Connected, known: KnownPeers) -> None:
        self._of, self._known = of, known
        self.alone = False
        self._present: frozenset[str] = frozenset()
        self._asked: dict[str, Asked] = {}
        self._learn_due = self._clock_due = 0.0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._present = self._in_table()
        self._set_alone(not self._present and bool(self._others()))
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends it, and keeps what it has learned."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._known.save(at_last=True)

    async def pause(self, seconds: float) -> None:
        """Sleeps for so long; less if somebody has been found again or the machine has woken up, when all that is told
        and known of the swarm has to be told and asked again."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    async def look(self, *, joining: bool = False) -> None:
        """One look for those whose turn it is. A peer that is ``joining`` goes by the others' clocks."""
        missed = not self._present
        self._present = self._in_table()
        now = asyncio.get_running_loop().time()
        turn = whom_to_ask(self._others(), self._present, self._asked, now, most=_AT_A_TIME)
        found = any(await asyncio.gather(*(self._ask(peer_id, now) for peer_id in turn)))
        if found:
            with contextlib.suppress(Exception):  # who else is there
                await asyncio.wait_for(self._of.dht.find_nearest_nodes([self._of.dht.node_id]), _ASK_SECONDS)
        self._present = self._in_table()
        if found or (missed and self._present):
            await self._set_clock(trusting=joining)
            self.tell()
        if not self._present and not missed:
            self._asked.clear()  # at once
        self._set_alone(not self._present and (self.alone or not missed))

    async def look_for_all(self) -> None:
        """Asks all known peers at once, by their addresses: the daemon has been started again, and knows nobody."""
        now = asyncio.get_running_loop().time()
        self._present = frozenset()
        await asyncio.gather(*(self._ask(peer_id, now) for peer_id in self._others()))
        self._present = self._in_table()

    async def _set_clock(self, *, trusting: bool) -> None:
        """Moves this process's time to that of the others, as far as there are any."""
        peers = [read_peer_id(peer_id) for peer_id in [*self._present][:_AT_A_TIME]]
        corrected = CLOCK.set_by(await measure_skews(self._of.p2p, peers, _ASK_SECONDS), trusting=trusting)
        # two peers come to one time step by step
        self._clock_due = asyncio.get_running_loop().time() + (0.0 if corrected else _CLOCK_SECONDS)

    async def _run(self) -> None:
        last, jumped = Instant.now(), False
        while True:
            try:
                await self._keep_time(jumped)
                await self.look()
                await self._learn()
            except Exception as error:
                logger.debug("could not look for other peers, will try again: %r", error)
            before = Instant.now()
            await asyncio.sleep(_TICK_SECONDS)
            now = Instant.now()
            jumped = stood_still(before, now, _TICK_SECONDS) or was_set(last, now)
            last = now

    async def _keep_time(self, jumped: bool) -> None:
        if jumped:
            self._asked.clear()  # whatever was found out is old
            if not self._in_table():
                CLOCK.follow_wall()
        if jumped or asyncio.get_running_loop().time() > self._clock_due:
            await self._set_clock(trusting=jumped)
        if jumped:
            self.tell()

    async def _learn(self) -> None:
        """Notes who is there and where they listen."""
        now = asyncio.get_running_loop().time()
        known = self._known.peer_ids()
        new = self._present - set(known)
        if now < self._learn_due and (not new or len(known) >= MAX_CONTACTS):
            return
        self._learn_due = now + _LEARN_SECONDS
        contacts = await asyncio.gather(*map(self._contact, [*(self._present - new), *new][:MAX_CONTACTS]))
        self._known.met(contacts, CLOCK.now())
        self._known.save()

    async def _contact(self, peer_id: str) -> Contact:
        try:
            finding = find_addresses(self._of.p2p, read_peer_id(peer_id))
            return Contact(peer_id, await asyncio.wait_for(finding, _ASK_SECONDS))
        except Exception:
            return Contact(peer_id, ())

    async def _ask(self, peer_id: str, now: float) -> bool:
        """Whether a peer that was missing is there."""
        peer, missing = read_peer_id(peer_id), peer_id not in self._present
        dht = self._of.dht
        answer = None
        with contextlib.suppress(Exception):
            if missing:
                addresses = self._known.addresses(peer_id)
                await asyncio.wait_for(connect(self._of.p2p, peer, addresses), _ASK_SECONDS)
            # it takes us into its table too, and each gives the other the records that it should have
            answer = await asyncio.wait_for(dht.protocol.call_ping(peer), _ASK_SECONDS)
        failures = 0 if answer is not None else self._asked.get(peer_id, Asked(now)).failures + 1
        self._asked[peer_id] = Asked(now, failures)
        if answer is None:
            return False
        dht.blacklist.register_success(peer)
        await asyncio.sleep(0)  # hivemind writes it into its table in a task
        return missing

    def _set_alone(self, alone: bool) -> None:
        if alone and not self.alone:
            logger.warning("no other peer of the swarm answers: this one is alone, and goes on looking for them")
        elif self.alone and not alone:
            logger.warning("other peers of the swarm are there again")
        self.alone = alone

    def _others(self) -> list[str]:
        mine = self._of.p2p.peer_id.to_base58()
        return [peer_id for peer_id in self._known.peer_ids() if peer_id != mine]

    def _in_table(self) -> frozenset[str]:
        return frozenset(peer_id.to_base58() for peer_id in self._of.dht.protocol.routing_table.peer_id_to_uid)

    def tell(self) -> None:
        """There is news of this peer for the swarm: ends every :meth:`pause`."""
        self._news.set()
        self._news = asyncio.Event()
