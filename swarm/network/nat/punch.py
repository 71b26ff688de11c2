"""Direct connections to peers behind NATs, arranged by a relay.

The daemon's own hole punching waits for a public address that four others have seen, which few swarms have. So the
asking peer, the relay and the target arrange it themselves, before there is any connection between the two: the daemon
dials nobody to whom it has one, through a relay or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import runtime_pb2

from ...wire import rpc
from ...wire.fields import read
from ...wire.peer_id import read_peer_id
from ..daemon_calls import dial, direct_connections
from .circuits import MAX_ADDRESS_CHARS, Circuit
from .hole import Place, join, punch

ASK, OPEN = "SwarmReach.punch", "SwarmReach.open"
_VERSION = 1
_DIAL_SECONDS = 2
_PASS_SECONDS = 4.0  # for the target's answer
_ASK_SECONDS = 6.0
_WAIT_SECONDS = 0.1  # between two looks whether the other side has come
_AGAIN_SECONDS = 300.0  # after it has failed with a peer
_MAX_ADDRESSES = 8
_MAX_HOLES = 64
_MAX_RELAYS = 2  # that are asked
_MAX_KNOWN = 10_000
_ADDRESS = re.compile(r"/ip4/([0-9.]+)/tcp/([0-9]+)")
_Address = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS_CHARS)]
_Name = Annotated[str, msgspec.Meta(max_length=128)]


@dataclass(frozen=True)
class Question:
    """To a relay: tell ``target`` where I am, and me where it is. ``addresses`` are those at which I listen."""

    target: _Name
    addresses: tuple[_Address, ...] = ()
    version: int = _VERSION


@dataclass(frozen=True)
class Order:
    """From a relay to a peer that has a place there: ``peer`` is at ``address``. ``dial``: it can be dialed there; else
    the peer is about to dial."""

    peer: _Name
    address: _Address
    dial: bool = False
    version: int = _VERSION


@dataclass(frozen=True)
class Reply:
    """What the target does, and where it is.

    Attributes:
        how: ``connected``: it has dialed; ``opened``: for a moment it can be dialed at ``address``; ``wait``: it is
            about to dial by itself; empty: nothing.
    """

    how: str = ""
    address: _Address = ""


class Allowance:
    """``count`` times in ``seconds`` for each name; of the names that came last."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._used: OrderedDict[object, deque[float]] = OrderedDict()

    def take(self, name: object, now: float) -> bool:
        """Whether it is allowed once more."""
        used = self._used.setdefault(name, deque())
        self._used.move_to_end(name)
        while len(self._used) > _MAX_KNOWN:
            self._used.popitem(last=False)
        while used and used[0] <= now - self._seconds:
            used.popleft()
        if len(used) >= self._count:
            return False
        used.append(now)
        return True


def read_place(address: str) -> Place | None:
    """IP and port of ``/ip4/…/tcp/…``, if others can be there."""
    found = _ADDRESS.fullmatch(address.partition("/p2p/")[0])
    with contextlib.suppress(ValueError):
        ip, port = ipaddress.IPv4Address(found[1] if found else ""), int(found[2] if found else 0)
        if 0 < port < 65536 and not (ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_reserved):
            return str(ip), port
    return None


def is_allowed(place: Place, relay: Place) -> bool:
    """Whether a peer may be said to be there by this relay: one from outside can't point into a private network."""
    return ipaddress.ip_address(place[0]).is_global or not ipaddress.ip_address(relay[0]).is_global


class Puncher:
    """Asks relays, and answers as one and as a target.

    Args:
        host: where the daemon listens.
        port: on which port; 0: one that it has chosen.
        relays: the names of those at which this peer has a place.

    Attributes:
        made: direct connections that came about, to and from peers behind NATs.
        direct: peers behind relays to which there was a direct connection when it was last needed.
    """

    def __init__(self, p2p: P2P, host: str, port: int, relays: Callable[[], Collection[str]]) -> None:
        self._p2p, self._host, self._port, self._relays = p2p, host, port, relays
        self.made = 0
        self.direct: set[PeerID] = set()
        self._asking: dict[PeerID, asyncio.Task[bool]] = {}
        self._failed: OrderedDict[PeerID, float] = OrderedDict()  # until when it isn't tried again
        self._holes: set[asyncio.Task[None]] = set()
        self._by_asker, self._by_target, self._orders = Allowance(10, 60.0), Allowance(30, 60.0), Allowance(60, 60.0)

    async def register(self) -> None:
        """Starts to answer."""
        await self._p2p.add_protobuf_handler(ASK, self._pass_on, runtime_pb2.ExpertInfo)
        await self._p2p.add_protobuf_handler(OPEN, self._open, runtime_pb2.ExpertInfo)

    async def stop(self) -> None:
        """Ends what is under way, and the connections that lead through here."""
        ending = {*self._holes, *self._asking.values()}
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)

    async def reach(self, peer_id: PeerID, circuits: Sequence[Circuit]) -> bool:
        """Whether there is a direct connection to a peer behind these relays; makes one if there is none at all."""
        now = asyncio.get_running_loop().time()
        if peer_id not in self._asking:
            if self._failed.get(peer_id, now) > now:
                return False
            self._asking[peer_id] = asyncio.create_task(self._reach(peer_id, circuits))
            self._asking[peer_id].add_done_callback(lambda _: self._asking.pop(peer_id))
        return await asyncio.shield(self._asking[peer_id])

    async def _reach(self, peer_id: PeerID, circuits: Sequence[Circuit]) -> bool:
        found = False
        with contextlib.suppress(Exception):
            found = await self._is_direct(peer_id)
            if peer_id not in {peer.peer_id for peer in await self._p2p.list_peers()}:
                found = await self._arrange(peer_id, circuits)
                self.made += found
        if found:
            self.direct.add(peer_id)
        else:
            self.direct.discard(peer_id)
            self._failed.pop(peer_id, None)
            self._failed[peer_id] = asyncio.get_running_loop().time() + _AGAIN_SECONDS
            while len(self._failed) > _MAX_KNOWN:
                self._failed.popitem(last=False)
        return found

    async def _arrange(self, peer_id: PeerID, circuits: Sequence[Circuit]) -> bool:
        relays = {circuit.relay: circuit.where for circuit in reversed(circuits) if circuit.relay != self._p2p.peer_id}
        question = Question(peer_id.to_base58(), tuple(map(_multiaddr, await self._listens()))[:_MAX_ADDRESSES])
        for relay, where in [*relays.items()][: -_MAX_RELAYS - 1 : -1]:
            with contextlib.suppress(Exception):
                await dial(self._p2p, relay, [where], _DIAL_SECONDS)
                reply = await self._call(relay, ASK, question, _ASK_SECONDS)
                if reply.how == "opened" and read_place(reply.address) is not None:
                    await dial(self._p2p, peer_id, [reply.address], _DIAL_SECONDS)
                return await self._comes(peer_id, _DIAL_SECONDS if reply.how == "wait" else 0)
        return False

    async def _listens(self) -> list[Place]:
        addresses = [str(each) for each in await self._p2p.get_visible_maddrs(latest=True)]
        places = [read_place(address) for address in addresses if "/p2p-circuit" not in address]
        return [place for place in places if place is not None]

    async def _comes(self, peer_id: PeerID, seconds: float) -> bool:
        """Whether there is a direct connection to a peer within ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (there := await self._is_direct(peer_id)) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_WAIT_SECONDS)
        return there

    async def _is_direct(self, peer_id: PeerID) -> bool:
        return peer_id in await direct_connections(self._p2p)

    async def _call(self, peer_id: PeerID, handle: str, message: Question | Order, timeout: float) -> Reply:
        call = self._p2p.call_protobuf_handler(peer_id, handle, _message(message), runtime_pb2.ExpertInfo)
        return read(Reply, rpc.load((await asyncio.wait_for(call, timeout)).serialized_info))

    async def _pass_on(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """As the relay. What it tells of both is what it sees itself."""
        question = read(Question, rpc.load(request.serialized_info))
        now = asyncio.get_running_loop().time()
        if not self._by_asker.take(context.remote_id, now) or not self._by_target.take(question.target, now):
            return _message(Reply())
        target = read_peer_id(question.target)
        seen = await direct_connections(self._p2p)
        asker_at, target_at = (_seen_at(seen.get(each, ())) for each in (context.remote_id, target))
        if asker_at is None or target_at is None or asker_at[0] == target_at[0]:  # behind one NAT they need no help
            return _message(Reply())
        address = _multiaddr(asker_at)
        order = Order(context.remote_id.to_base58(), address, address in question.addresses)
        reply = await self._call(target, OPEN, order, _PASS_SECONDS)
        return _message(Reply(reply.how, _multiaddr(target_at) if reply.how == "opened" else ""))

    async def _open(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """As the target."""
        order = read(Order, rpc.load(request.serialized_info))
        peer_id, place = read_peer_id(order.peer), read_place(order.address)
        relay = _seen_at((await direct_connections(self._p2p)).get(context.remote_id, ()))
        if (
            context.remote_id.to_base58() not in self._relays()
            or None in (place, relay)
            or not is_allowed(place, relay)  # type: ignore[arg-type]
            or not self._orders.take(context.remote_id, asyncio.get_running_loop().time())
        ):
            return _message(Reply())
        if peer_id in self._asking and self._p2p.peer_id.to_base58() < order.peer:
            return _message(Reply("wait"))  # both ask at once: one of them has to be the one that dials
        assert place is not None
        return _message(Reply(await (self._dial(peer_id, place) if order.dial else self._make_hole(place))))

    async def _dial(self, peer_id: PeerID, place: Place) -> str:
        with contextlib.suppress(Exception):
            await dial(self._p2p, peer_id, [_multiaddr(place)], _DIAL_SECONDS)
            if await self._is_direct(peer_id):
                self.made += 1
                return "connected"
        return ""

    async def _make_hole(self, place: Place) -> str:
        port = self._port or next((port for _, port in await self._listens()), 0)
        if not port or len(self._holes) >= _MAX_HOLES or not hasattr(socket, "SO_REUSEPORT") or ":" in self._host:
            return ""
        task = asyncio.create_task(self._hold((self._host, port), place))
        self._holes.add(task)
        task.add_done_callback(self._holes.discard)
        return "opened"

    async def _hold(self, own: Place, other: Place) -> None:
        outside = await punch(own, other, _DIAL_SECONDS + 1.0)
        if outside is not None:
            self.made += 1
            await join(outside, own if own[0] != "0.0.0.0" else ("127.0.0.1", own[1]))


def _seen_at(addresses: Sequence[str]) -> Place | None:
    return next((place for place in map(read_place, addresses) if place is not None), None)


def _multiaddr(place: Place) -> str:
    return f"/ip4/{place[0]}/tcp/{place[1]}"


def _message(message: Question | Order | Reply) -> runtime_pb2.ExpertInfo:
    return runtime_pb2.ExpertInfo(serialized_info=rpc.dump(vars(message)))
