"""Pushes to a peer on loopback: in order, over one stream, over a new one after it broke, and failures are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hivemind.p2p import P2P, P2PContext
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm.errors import PeerLostError, SwarmError
from swarm.node.rpc.pusher import Pusher
from swarm.wire.rpc import PUSH, PUSH_STREAM, Request, Response, handle_name
from swarm.wire.stream import MessageStream


@dataclass(eq=False)
class Receiver:
    """A peer that takes pushes, and keeps what came and over which stream (0: none, each in a call of its own)."""

    p2p: P2P
    came: asyncio.Queue[tuple[int, str]] = field(default_factory=asyncio.Queue)
    streams: list[MessageStream] = field(default_factory=list)
    ended: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def serve_streams(self) -> None:
        await self.p2p.add_binary_stream_handler(handle_name(PUSH_STREAM), self._stream)

    async def serve_calls(self) -> None:
        await self.p2p.add_protobuf_handler(handle_name(PUSH), self._call, Request)

    async def next(self, count: int) -> list[tuple[int, str]]:
        return [await self.came.get() for _ in range(count)]

    async def _stream(self, _: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = MessageStream(reader, writer, max_bytes=2**20)
        self.streams.append(stream)
        number = len(self.streams)
        with suppress(SwarmError):
            while (request := await stream.receive(Request)) is not None:
                self.came.put_nowait((number, request.uid))
        self.ended.put_nowait(number)
        stream.close()

    async def _call(self, request: Any, _: P2PContext) -> Any:
        self.came.put_nowait((0, request.uid))
        return Response()


def scene(play: Callable[[Pusher, Receiver], Awaitable[None]]) -> None:
    """Plays between a pusher and a peer that it can reach."""

    async def run() -> None:
        receiver = Receiver(await P2P.create(nat_port_map=False))
        peers = [str(address) for address in await receiver.p2p.get_visible_maddrs()]
        sender = await P2P.create(initial_peers=peers, nat_port_map=False)
        pusher = Pusher(sender)
        try:
            await play(pusher, receiver)
        finally:
            pusher.close()
            await sender.shutdown()
            await receiver.p2p.shutdown()

    asyncio.run(asyncio.wait_for(run(), 60))


def named(name: object) -> Request:
    return Request(uid=str(name))


def test_what_is_pushed_comes_in_order_over_one_stream() -> None:
    async def play(pusher: Pusher, receiver: Receiver) -> None:
        await receiver.serve_streams()
        peer = receiver.p2p.peer_id
        assert not pusher.push_now(peer, named("x")), "there is no stream yet"
        pushes = [asyncio.create_task(pusher.push(peer, named(number))) for number in range(20)]
        await asyncio.sleep(0)
        assert not pusher.push_now(peer, named("x")), "others are to go first"
        await asyncio.gather(*pushes)
        for number in range(20, 40):
            assert pusher.push_now(peer, named(number))
        assert await receiver.next(40) == [(1, str(number)) for number in range(40)]

    scene(play)


def test_a_stream_that_broke_is_followed_by_another() -> None:
    async def play(pusher: Pusher, receiver: Receiver) -> None:
        await receiver.serve_streams()
        peer = receiver.p2p.peer_id
        await pusher.push(peer, named("before"))
        assert await receiver.next(1) == [(1, "before")]
        pusher._streams[peer].close()
        assert not pusher.push_now(peer, named("x")), "it sees that the stream is gone"
        await pusher.push(peer, named("after"))
        assert await receiver.next(1) == [(2, "after")]
        pusher._streams[peer].close()
        await pusher.push(peer, named("again"))
        assert await receiver.next(1) == [(3, "again")]

    scene(play)


def test_a_peer_without_push_streams_gets_calls() -> None:
    """As servers of Petals."""

    async def play(pusher: Pusher, receiver: Receiver) -> None:
        await receiver.serve_calls()
        for number in range(3):
            assert not pusher.push_now(receiver.p2p.peer_id, named(number))
            await pusher.push(receiver.p2p.peer_id, named(number))
        assert await receiver.next(3) == [(0, "0"), (0, "1"), (0, "2")]

    scene(play)


def test_the_caller_learns_of_a_failure_and_may_try_again() -> None:
    async def play(pusher: Pusher, receiver: Receiver) -> None:
        peer = receiver.p2p.peer_id
        with pytest.raises(PeerLostError, match="can't push"):
            await pusher.push(peer, named("lost"))  # it serves nothing yet
        assert not pusher._locks, "nothing is kept of it"
        await receiver.serve_streams()
        await pusher.push(peer, named("found"))
        assert await receiver.next(1) == [(1, "found")]

    scene(play)


def test_closing_ends_the_streams() -> None:
    async def play(pusher: Pusher, receiver: Receiver) -> None:
        await receiver.serve_streams()
        await pusher.push(receiver.p2p.peer_id, named("last"))
        assert await receiver.next(1) == [(1, "last")]
        pusher.close()
        assert await receiver.ended.get() == 1
        assert not pusher.push_now(receiver.p2p.peer_id, named("x"))

    scene(play)
