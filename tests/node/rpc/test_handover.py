"""A session's cache from one node to another over the network, and all that is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hivemind.p2p import P2P

from swarm.errors import BadRequestError, MalformedError
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.engine import Engine
from swarm.node.rpc import chunks
from swarm.node.rpc.chunks import ChunkFormat, read_chunk, write_chunk
from swarm.node.rpc.handler import Handler
from swarm.node.rpc.limits import Limits
from swarm.node.rpc.requests import Served
from swarm.wire import rpc
from swarm.wire.codec import decode, encode
from swarm.wire.handover import HANDOVER, TakeOver
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream
from tests.models import tiny_model

HIDDEN, COLUMNS = 64, 40
KEY = b"k" * 16
FORM = ChunkFormat(((2, 8), (2, 4)), torch.float32, (0, 3))


def test_chunks_cover_all_columns_and_none_is_larger_than_a_message() -> None:
    form = dataclasses.replace(FORM, shapes=((8, 128),) * 20, padding=(0,) * 4)
    pieces = list(form.divide(1000))
    assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]
    assert (pieces[0][0], pieces[-1][1]) == (0, 1000)
    assert all((end - start) * form.column_bytes <= form.message_bytes for start, end in pieces)
    assert list(FORM.divide(0)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[:1],
        lambda tensors: [tensors[0], tensors[0]],
        lambda tensors: [tensors[0].half(), tensors[1]],
        lambda tensors: [tensors[0][:, 1:], tensors[1]],
        lambda tensors: [tensors[0], tensors[1] * float("nan")],
    ],
)
def test_a_chunk_that_is_not_what_was_asked_for(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
    tensors = [torch.ones(heads, FORM.tokens(2, 5), size) for heads, size in FORM.shapes]
    end, right = read_chunk(write_chunk(tensors, 5), FORM, 2, 9)
    assert end == 5
    assert all(torch.equal(*pair) for pair in zip(right, tensors, strict=True))
    for response in (write_chunk(change(tensors), 5), write_chunk(tensors, 2), write_chunk(tensors, 10)):
        with pytest.raises(MalformedError):
            read_chunk(response, FORM, 2, 9)


@dataclass
class Place:
    """A node."""

    p2p: P2P
    engine: Engine
    handler: Handler


@dataclass
class Scene:
    old: Place
    new: Place
    client: P2P
    streams: list[MessageStream] = field(default_factory=list)  # or they would be closed as nobody needs them

    async def open(self, place: Place, **fields: Any) -> tuple[MessageStream, int]:
        """A session and how many columns it begins with."""
        stream = await _stream(self.client, place, rpc.INFERENCE)
        self.streams.append(stream)
        await stream.send(step(torch.empty(2, 0, HIDDEN), max_length=64, left_padding=[0, 3], **fields))
        response = await stream.receive(Response)
        assert response is not None
        return stream, rpc.load(response.metadata)["reused"]

    async def begun(self, **fields: Any) -> TakeOver:
        """A session at the old node; what another is to take over from it."""
        stream, _ = await self.open(self.old, session_id="s", handover_key=KEY, **fields)
        await run(stream, hidden(COLUMNS), 0)
        return TakeOver(self.old.p2p.peer_id, "s", KEY, COLUMNS, 0, 10.0)


def step(hidden: torch.Tensor, **fields: Any) -> Any:
    tensors = [encode(hidden), encode(rpc.EMPTY), encode(rpc.EMPTY_INT64)]
    return Request(uid=span_uid("m", 0, 2), tensors=tensors, metadata=rpc.dump(fields))


def hidden(columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, columns, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def run(stream: MessageStream, hidden: torch.Tensor, start: int) -> torch.Tensor:
    await stream.send(step(hidden, start=start))
    response = await stream.receive(Response)
    assert response is not None
    return decode(response.tensors[0], max_elements=2**20)


async def _stream(client: P2P, place: Place, method: str) -> MessageStream:
    _, reader, writer = await client.call_binary_stream_handler(place.p2p.peer_id, rpc.handle_name(method))
    return MessageStream(reader, writer, max_bytes=2**24)


@pytest.fixture(scope="module")
def span() -> Span:
    return load_span(resolve(str(tiny_model("llama-gqa", layers=2))), 0, 2, dtype=torch.float32, device="cpu")


@asynccontextmanager
async def two_nodes(span: Span) -> AsyncIterator[Scene]:
    places: list[Place] = []
    peers: list[str] = []
    for _ in range(2):
        engine = Engine(span, cache_tokens=4096)
        engine.start()
        node = await P2P.create(initial_peers=peers, nat_port_map=False)
        peers += [str(address) for address in await node.get_visible_maddrs()]
        handler = Handler(node, engine, Served("m", 0, 2, HIDDEN, torch.float32), Limits(max_length=64))
        await handler.register()
        places.append(Place(node, engine, handler))
    client = await P2P.create(initial_peers=peers, nat_port_map=False)
    try:
        yield Scene(places[0], places[1], client)
    finally:
        for place in places:
            await place.handler.leave(1.0)
            place.engine.stop()
        for p2p in (client, *(place.p2p for place in places)):
            await p2p.shutdown()


def play(span: Span, what: Callable[[Scene], Awaitable[None]]) -> None:
    async def scene() -> None:
        async with two_nodes(span) as nodes:
            await what(nodes)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_session_goes_on_where_another_has_been(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_BYTES", 7 * 2 * 4 * 2 * 2 * 32)  # several chunks

    async def go(scene: Scene) -> None:
        take_over = await scene.begun()
        stream, reused = await scene.open(scene.new, take_over=take_over.to_dict())
        assert reused == COLUMNS
        given = await run(stream, hidden(3, 1), COLUMNS)
        assert scene.new.engine.stats().handed_over_tokens == 2 * COLUMNS - 3
        fresh, _ = await scene.open(scene.new)
        expected = await run(fresh, torch.cat([hidden(COLUMNS), hidden(3, 1)], dim=1), 0)
        torch.testing.assert_close(given, expected[:, COLUMNS:])

    play(span, go)


def test_what_is_refused(span: Span) -> None:
    async def go(scene: Scene) -> None:
        right = await scene.begun()
        assert (await scene.open(scene.new, take_over=right.to_dict()))[1] == COLUMNS
        for wrong in (
            {"key": b"x" * 16},
            {"key": b""},
            {"session_id": "another"},
            {"reorders": 1},
            {"peer_id": scene.client.peer_id},
            {"seconds": 0.0},
        ):
            take_over = dataclasses.replace(right, **wrong)  # type: ignore[arg-type]
            stream, reused = await scene.open(scene.new, take_over=take_over.to_dict())
            assert reused == 0, wrong
            assert (await run(stream, hidden(COLUMNS), 0)).shape == (2, COLUMNS, HIDDEN)
        fetch = {"session_id": "s", "key": KEY, "columns": COLUMNS, "reorders": 0, "left_padding": [0, 3]}
        fetch |= {"adapter": "", "dtype": "float32"}
        for uid, wrong in (
            (span_uid("m", 0, 2), {"dtype": "bfloat16"}),
            (span_uid("m", 0, 2), {"left_padding": [3, 0]}),
            (span_uid("m", 0, 2), {"left_padding": [0]}),
            (span_uid("m", 0, 2), {"adapter": "a"}),
            (span_uid("m", 0, 2), {"columns": -1}),
            (span_uid("m", 1, 3), {}),
            ("nonsense", {}),
        ):
            stream = await _stream(scene.client, scene.old, HANDOVER)
            await stream.send(Request(uid=uid, metadata=rpc.dump(fetch | wrong)))
            with pytest.raises(BadRequestError):
                await stream.receive(Response)

    play(span, go)


def test_a_node_that_leaves_keeps_a_session_until_it_has_been_fetched(span: Span) -> None:
    async def go(scene: Scene) -> None:
        take_over = await scene.begun()
        leaving = asyncio.create_task(scene.old.handler.leave(1.0, 30.0))
        await asyncio.sleep(0.2)
        assert not leaving.done()
        assert scene.old.engine.stats().sessions == 1
        _, reused = await scene.open(scene.new, take_over=take_over.to_dict())
        assert reused == COLUMNS
        await asyncio.wait_for(leaving, 20)
        while scene.old.engine.stats().sessions:
            await asyncio.sleep(0.01)

    play(span, go)


def test_what_has_come_in_time_is_used(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node falls silent behind the first chunk."""
    monkeypatch.setattr(chunks, "_BYTES", 8 * 2 * 4 * 2 * 2 * 32)

    async def go(scene: Scene) -> None:
        take_over = await scene.begun()
        give = scene.old.handler._sessions.handovers._read

        async def stall(*args: Any) -> AsyncIterator[Any]:
            async for chunk in give(*args):
                yield chunk
                await asyncio.sleep(3600)

        monkeypatch.setattr(scene.old.handler._sessions.handovers, "_read", stall)
        short = dataclasses.replace(take_over, seconds=2.0)
        stream, reused = await scene.open(scene.new, take_over=short.to_dict())
        assert 0 < reused < COLUMNS
        given = await run(stream, hidden(COLUMNS)[:, reused:], reused)
        fresh, _ = await scene.open(scene.new)
        torch.testing.assert_close(given, (await run(fresh, hidden(COLUMNS), 0))[:, reused:])

    play(span, go)
