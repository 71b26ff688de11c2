"""A running peer on the local network: it announces itself if it listens, and goes on looking for its swarm's nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from ... import __version__
from ...wire.peer_id import peer_id_of
from ..daemon_calls import connect
from ..peer import Peer
from .addresses import announced, is_loopback, multicast_hosts, own_interfaces
from .look import dial
from .multicast import Multicast
from .record import LanRecord, model_label

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 15.0  # between two looks at this machine's networks, which change when a laptop is carried around
_MEET_SECONDS = 10.0
_PAUSE_SECONDS = 0.2  # between two changes, of which strangers can make many


class Presence:
    """Runs from :meth:`start` to :meth:`stop`, which :meth:`Peer.stop` calls.

    Two nodes that start at the same moment find nobody and start a swarm each; as both go on looking, they join each
    other when they hear each other.

    Args:
        swarm: its name.
        announces: others are to hear of the peer.
    """

    def __init__(self, peer: Peer, swarm: str, *, announces: bool) -> None:
        self.swarm = swarm
        self._peer, self._announces, self._model = peer, announces, ""
        self._multicast: Multicast | None = None
        self._hosts: tuple[str, ...] = ()
        self._record: LanRecord | None = None
        self._changed, self._met = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins. What fails later, such as a network that goes, is tried again.

        Raises:
            ConnectError: there is no network to listen on.
        """
        self._peer.presence = self
        await self._renew()
        self._task = asyncio.create_task(self._run())

    def serve(self, prefix: str) -> None:
        """From now on the peer is announced with the model ``prefix`` of the DHT; without, in a locked swarm."""
        self._model = model_label(prefix) if self._peer.lock is None else ""
        self._changed.set()

    async def met_somebody(self, timeout: float) -> bool:
        """Whether another node of the swarm was met, by ``timeout`` seconds from now."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._met.wait(), timeout)
        return self._met.is_set()

    async def stop(self) -> None:
        """Says goodbye."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._multicast is not None:
            await self._multicast.close()

    async def _run(self) -> None:
        while True:
            try:
                await self._renew()
                assert self._multicast is not None
                if not self._peer.dht.protocol.routing_table.peer_id_to_uid:
                    await self._multicast.ask_again()  # which it does ever more rarely by itself
                await self._meet()
            except Exception as error:
                logger.info("the local network can't be used now, will try again: %s", error)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _LOOK_SECONDS)
            await asyncio.sleep(_PAUSE_SECONDS)
            self._changed.clear()

    async def _renew(self) -> None:
        """Listens on the networks that there are now, and announces the addresses that the peer has now."""
        interfaces = own_interfaces()
        addresses: tuple[str, ...] = ()
        if self._announces:
            own = [str(maddr) for maddr in await self._peer.p2p.get_visible_maddrs(latest=True)]
            addresses = announced(own, interfaces)
        if addresses and all(is_loopback(address) for address in addresses):  # of no use to other machines
            interfaces = [one for one in interfaces if one.is_loopback]
        hosts = multicast_hosts(interfaces)
        if self._multicast is None or hosts != self._hosts:
            if self._multicast is not None:
                await self._multicast.close()
            self._multicast = self._record = None
            self._multicast, self._hosts = await Multicast.open(hosts, self._changed.set), hosts
        record = LanRecord(self._peer.peer_id.to_base58(), self.swarm, self._model, __version__, addresses)
        if addresses and record != self._record:
            await self._multicast.announce(record)
            self._record = record

    async def _meet(self) -> None:
        """Joins the nodes of its swarm that it doesn't know."""
        assert self._multicast is not None
        table = self._peer.dht.protocol.routing_table.peer_id_to_uid
        known = {peer_id.to_base58() for peer_id in (self._peer.peer_id, *table)}
        interfaces = own_interfaces()

        async def meet(record: LanRecord) -> None:
            for maddr in await dial(record, interfaces):
                if await found(self._peer, maddr):
                    self._met.set()
                    return

        records = self._multicast.records
        await asyncio.gather(*(meet(one) for one in records if one.swarm == self.swarm and one.peer_id not in known))


async def found(peer: Peer, maddr: str) -> bool:
    """Joins the swarms of two peers: connects to ``/…/p2p/…`` and has both know each other; whether it answered."""
    try:
        peer_id = peer_id_of(maddr)
        await asyncio.wait_for(connect(peer.p2p, peer_id, [maddr.rpartition("/p2p/")[0]]), _MEET_SECONDS)
        return await asyncio.wait_for(peer.dht.protocol.call_ping(peer_id), _MEET_SECONDS) is not None
    except Exception as error:
        logger.info("%s can't be joined: %s", maddr, error)
        return False
