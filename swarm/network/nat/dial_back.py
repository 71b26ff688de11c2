"""Asking a peer to connect to this one from outside, and doing so for others.

A connection that is there already proves nothing: this side opened it. So a second daemon, which knows nobody, tries
the addresses; the peer's key has to fit too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.multiaddr import Multiaddr

from ...wire import rpc
from ...wire.fields import read
from .circuits import MAX_ADDRESS_CHARS

HANDLE = "SwarmReach.dial_back"
_MAX_ADDRESSES = 8
_DIAL_SECONDS = 5.0
_QUEUE_SECONDS = 5.0
_IDLE_SECONDS = 20.0
_Address = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS_CHARS)]


@dataclass(frozen=True)
class Question:
    """Do these addresses lead to me? None: the question is only about the one who is asked."""

    addresses: tuple[_Address, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a peer says.

    Attributes:
        reached: whether it could connect; None if it was too busy to try.
        relays: it lets others through.
        addresses: its own.
    """

    reached: bool | None = None
    relays: bool = False
    addresses: tuple[_Address, ...] = ()


class DialBack:
    """Answers who asks. One peer is tried at a time.

    Args:
        start_probe: starts a daemon that knows nobody.
        about: says whether this peer lets others through, and its addresses.
    """

    def __init__(
        self, p2p: P2P, start_probe: Callable[[], Awaitable[P2P]], about: Callable[[], tuple[bool, Sequence[str]]]
    ) -> None:
        self._p2p, self._start_probe, self._about = p2p, start_probe, about
        self._turn = asyncio.Lock()
        self._probe: P2P | None = None
        self._ending: asyncio.Task[None] | None = None

    async def register(self) -> None:
        """Starts to answer."""
        await self._p2p.add_protobuf_handler(HANDLE, self._answer, runtime_pb2.ExpertInfo)

    async def stop(self) -> None:
        """Ends the probe, if there is one."""
        if self._ending is not None:
            self._ending.cancel()
        if self._probe is not None:
            await self._probe.shutdown()
            self._probe = None

    async def _answer(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertInfo:
        question = read(Question, rpc.load(request.serialized_info))
        reached = await self._try(context.remote_id, question.addresses[:_MAX_ADDRESSES])
        relays, addresses = self._about()
        return _message({"reached": reached, "relays": relays, "addresses": list(addresses)[:_MAX_ADDRESSES]})

    async def _try(self, peer_id: PeerID, addresses: Sequence[str]) -> bool | None:
        wanted = []
        for address in addresses:
            with contextlib.suppress(Exception):
                wanted.append(Multiaddr(address.partition("/p2p/")[0]))
        if not wanted:
            return None
        try:
            await asyncio.wait_for(self._turn.acquire(), _QUEUE_SECONDS)
        except asyncio.TimeoutError:
            return None
        try:
            return await self._dial(peer_id, wanted)
        finally:
            self._turn.release()

    async def _dial(self, peer_id: PeerID, addresses: Sequence[Multiaddr]) -> bool | None:
        if self._ending is not None:
            self._ending.cancel()
        if self._probe_is_dead():
            self._probe = None
        try:
            self._probe = self._probe or await self._start_probe()
        except Exception:
            return None
        self._ending = asyncio.create_task(self._end_probe())
        try:
            await asyncio.wait_for(self._probe._client.connect(peer_id, addresses), _DIAL_SECONDS)
        except Exception:
            return None if self._probe_is_dead() else False
        with contextlib.suppress(Exception):
            await self._probe._client.disconnect(peer_id)
        return True

    def _probe_is_dead(self) -> bool:
        return self._probe is not None and self._probe._child.returncode is not None

    async def _end_probe(self) -> None:
        await asyncio.sleep(_IDLE_SECONDS)
        async with self._turn:
            probe, self._probe, self._ending = self._probe, None, None
            if probe is not None:
                await probe.shutdown()


async def ask(p2p: P2P, peer_id: PeerID, addresses: Sequence[str], timeout: float) -> Answer | None:
    """What a peer says; None if it doesn't answer in ``timeout`` seconds, or doesn't know the question."""
    try:
        call = p2p.call_protobuf_handler(
            peer_id, HANDLE, _message({"addresses": list(addresses)[:_MAX_ADDRESSES]}), runtime_pb2.ExpertInfo
        )
        answer = await asyncio.wait_for(call, timeout)
        return read(Answer, rpc.load(answer.serialized_info))
    except Exception:
        return None


def _message(fields: dict[str, object]) -> runtime_pb2.ExpertInfo:
    return runtime_pb2.ExpertInfo(serialized_info=rpc.dump(fields))
