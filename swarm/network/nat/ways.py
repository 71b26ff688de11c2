"""Calls that go through a peer's relays where it can't be reached otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hivemind.p2p import PeerID

from ...wire.peer_id import read_peer_id
from ..daemon import LastingP2P
from .circuits import Circuit
from .punch import Puncher

_MAX_KNOWN = 10_000
_CONNECT_SECONDS = 8.0
_FIND_SECONDS = 3.0
_PAUSE_SECONDS = 1.0


class WayfindingP2P(LastingP2P):
    """``P2P`` that knows of some peers through whom they are reached.

    Attributes:
        puncher: makes direct connections to them, if that is wanted.
        find_ways: asks the swarm, for :meth:`learn`, when a peer is called that this one has never met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.puncher: Puncher | None = None
        self.find_ways: Callable[[], Awaitable[object]] | None = None
        self._find_at = 0.0  # not before: clients name peers as often as they like
        self._met: OrderedDict[PeerID, float] = OrderedDict()  # peers not behind relays: until when that is believed
        self._ways: OrderedDict[PeerID, list[Circuit]] = OrderedDict()

    def learn(self, peer_id: PeerID, relays: Sequence[str]) -> None:
        """A peer says that it is behind these relays, or that it isn't. What is no address is left out."""
        ways = self._ways
        ways.pop(peer_id, None)
        circuits = []
        for relay in relays:
            with contextlib.suppress(ValueError):
                circuits.append(Circuit(relay))
        if circuits:
            ways[peer_id] = circuits
            while len(ways) > _MAX_KNOWN:
                ways.popitem(last=False)

    def reaches_directly(self, peer_id: str) -> bool:
        """Whether this process went around a peer's relays when it last called it."""
        return self.puncher is not None and read_peer_id(peer_id) in self.puncher.direct

    async def call_binary_stream_handler(self, peer_id: PeerID, *args: Any, **kwargs: Any) -> Any:
        """As ``P2P``'s."""
        await self._approach(peer_id)
        return await super().call_binary_stream_handler(peer_id, *args, **kwargs)

    async def _call_unary_protobuf_handler(self, peer_id: PeerID, *args: Any, **kwargs: Any) -> Any:
        await self._approach(peer_id)
        return await super()._call_unary_protobuf_handler(peer_id, *args, **kwargs)

    async def _approach(self, peer_id: PeerID) -> None:
        """Connects to a peer that is behind relays: directly, or through one of them. The daemon does nothing if there
        is a connection, and tries the peer's own addresses at the same time."""
        await self._wait()
        if peer_id not in self._ways and self._met.get(peer_id, 0.0) < asyncio.get_running_loop().time():
            await self._meet(peer_id)
        circuits = self._ways.get(peer_id)
        if circuits:
            at_hand = [circuit for circuit in circuits if circuit.relay not in self._ways]
            if self.puncher is not None and at_hand and await self.puncher.reach(peer_id, at_hand):
                return
            with contextlib.suppress(Exception):  # the call itself says why it can't be reached
                await asyncio.wait_for(self._client.connect(peer_id, circuits), _CONNECT_SECONDS)

    async def _meet(self, peer_id: PeerID) -> None:
        """Somebody has named a peer that is new here, as a client does its next hop."""
        loop = asyncio.get_running_loop()
        if self.find_ways is None or loop.time() < self._find_at:
            return
        self._find_at, believed = math.inf, math.inf
        try:
            with contextlib.suppress(Exception):
                if peer_id not in {peer.peer_id for peer in await self.list_peers()}:
                    believed = loop.time() + _FIND_SECONDS
                    await asyncio.wait_for(self.find_ways(), _FIND_SECONDS)
            self._met[peer_id] = believed
            while len(self._met) > _MAX_KNOWN:
                self._met.popitem(last=False)
        finally:
            self._find_at = 0.0 if believed == math.inf else loop.time() + _PAUSE_SECONDS
