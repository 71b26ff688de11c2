"""Pushing outputs to the next hop, over real streams to a peer that each test writes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hivemind.p2p import PeerID

from swarm.errors import PeerLostError
from swarm.node.rpc.pusher import Pusher
from swarm.wire.rpc import PUSH, PUSH_STREAM, Request, Response, handle_name
from swarm.wire.stream import MessageStream
from tests.loopback import LoopbackP2P

ONE, OTHER = PeerID(b"one"), PeerID(b"other")


class Receiver:
    """Peers that note what is pushed to them; each of their streams takes ``take`` messages, then breaks."""

    def __init__(self, *, streams: bool = True, take: int = 1000) -> None:
        self.seen: list[tuple[PeerID, str]] = []
        self.take = take
        self.p2p = LoopbackP2P(
            {handle_name(PUSH_STREAM): self._stream} if streams else {}, {handle_name(PUSH): self._answer}
        )
        self.calls = 0

    async def _stream(self, peer_id: PeerID, stream: MessageStream) -> None:
        for _ in range(self.take):
            request = await stream.receive(Request)
            if request is None:
                return
            self.seen.append((peer_id, request.uid))

    async def _answer(self, peer_id: PeerID, request: Any) -> Response:
        self.calls += 1
        self.seen.append((peer_id, request.uid))
        return Response()

    async def wait_for(self, count: int) -> None:
        async def enough() -> None:
            while len(self.seen) < count:
                await asyncio.sleep(0.001)

        await asyncio.wait_for(enough(), 5)


def test_in_order_over_one_stream_a_peer() -> None:
    async def run() -> None:
        receiver = Receiver()
        pusher = Pusher(receiver.p2p)  # type: ignore[arg-type]
        assert not pusher.push_now(ONE, Request(uid="0"))  # there is no stream yet
        await asyncio.gather(*(pusher.push(ONE, Request(uid=str(number))) for number in range(5)))
        assert pusher.push_now(ONE, Request(uid="5"))
        await pusher.push(OTHER, Request(uid="other"))
        await receiver.wait_for(7)
        assert [uid for peer, uid in receiver.seen if peer == ONE] == [str(number) for number in range(6)]
        assert receiver.p2p.opened == 2
        pusher.close()
        assert not pusher.push_now(ONE, Request(uid="6"))

    asyncio.run(run())


def test_nothing_overtakes_a_push_that_waits() -> None:
    async def run() -> None:
        receiver = Receiver()
        pusher = Pusher(receiver.p2p)  # type: ignore[arg-type]
        await pusher.push(ONE, Request(uid="0"))
        waiting = asyncio.create_task(pusher.push(ONE, Request(uid="1")))
        await asyncio.sleep(0)
        if not waiting.done():
            assert not pusher.push_now(ONE, Request(uid="2"))
        await waiting
        pusher.close()

    asyncio.run(run())


def test_a_broken_stream_is_opened_anew() -> None:
    async def run() -> None:
        receiver = Receiver(take=1)
        pusher = Pusher(receiver.p2p)  # type: ignore[arg-type]
        for number in range(3):
            await pusher.push(ONE, Request(uid=str(number)))
            await receiver.wait_for(number + 1)
            await asyncio.sleep(0.02)  # until the break is known here
        assert receiver.p2p.opened == 3
        pusher.close()

    asyncio.run(run())


def test_a_peer_without_push_streams_gets_single_calls() -> None:
    """As Petals' servers do it."""

    async def run() -> None:
        receiver = Receiver(streams=False)
        pusher = Pusher(receiver.p2p)  # type: ignore[arg-type]
        for number in range(2):
            await pusher.push(ONE, Request(uid=str(number)))
        assert receiver.calls == 2

    asyncio.run(run())


def test_a_peer_that_is_gone_is_told_of_and_tried_again_next_time() -> None:
    async def run() -> None:
        receiver = Receiver()
        receiver.p2p.unreachable.add(ONE)
        pusher = Pusher(receiver.p2p)  # type: ignore[arg-type]
        with pytest.raises(PeerLostError, match="can't push to"):
            await pusher.push(ONE, Request(uid="0"))
        receiver.p2p.unreachable.clear()
        await pusher.push(ONE, Request(uid="1"))
        await receiver.wait_for(1)
        assert receiver.p2p.opened == 1
        pusher.close()

    asyncio.run(run())
