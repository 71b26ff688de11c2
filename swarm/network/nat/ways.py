"""Calls that go through a peer's relays where it can't be reached otherwise."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from hivemind.p2p import PeerID

from ..daemon import LastingP2P
from .circuits import Circuit
from .punch import Puncher

_MAX_KNOWN = 10_000
_CONNECT_SECONDS = 8.0


class WayfindingP2P(LastingP2P):
    """``P2P`` that knows of some peers through whom they are reached.

    Attributes:
        puncher: makes direct connections to them, if that is wanted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.puncher: Puncher | None = None
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
        return self.puncher is not None and PeerID.from_base58(peer_id) in self.puncher.direct

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
        circuits = self._ways.get(peer_id)
        if circuits:
            await self._wait()
            at_hand = [circuit for circuit in circuits if circuit.relay not in self._ways]
            if self.puncher is not None and at_hand and await self.puncher.reach(peer_id, at_hand):
                return
            with contextlib.suppress(Exception):  # the call itself says why it can't be reached
                await asyncio.wait_for(self._client.connect(peer_id, circuits), _CONNECT_SECONDS)
