"""One hop of a session, over a real stream to a node that each test writes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.client.routing.route import Leg
from swarm.client.session.hop import Hop
from swarm.errors import BadRequestError, OutOfCacheError, PeerLostError, RemoteError
from swarm.wire import rpc
from swarm.wire.codec import decode, encode
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream
from tests.client.routing.test_routing import peer, span
from tests.loopback import LoopbackP2P

ROWS, HIDDEN = 2, 3
LEG = Leg(span("node", 0, 4), 0, 4)
Node = Callable[[MessageStream], Awaitable[None]]


def inputs(columns: int) -> torch.Tensor:
    return torch.arange(ROWS * columns * HIDDEN, dtype=torch.float32).reshape(ROWS, columns, HIDDEN)


def reply(tensor: torch.Tensor, **fields: Any) -> Response:
    return Response(tensors=[encode(tensor)], metadata=rpc.dump(fields))


async def opened(stream: MessageStream, **fields: Any) -> dict[str, Any]:
    """The fields of the opening, which is answered."""
    request = await stream.receive(Request)
    assert request is not None
    await stream.send(reply(torch.empty(ROWS, 0, HIDDEN), **fields))
    return rpc.load(request.metadata)


async def step(stream: MessageStream) -> tuple[dict[str, Any], torch.Tensor]:
    request = await stream.receive(Request)
    assert request is not None
    return rpc.load(request.metadata), decode(request.tensors[0], max_elements=1000)


def talk(node: Node, client: Callable[[Hop], Awaitable[None]], leg: Leg = LEG, **options: Any) -> None:
    async def serve(peer_id: object, stream: MessageStream) -> None:
        await node(stream)

    async def run() -> None:
        p2p: Any = LoopbackP2P({rpc.handle_name(rpc.INFERENCE): serve})
        asked = {"left_padding": (), "timeout": 5.0, **options}
        hop = await Hop.open(
            p2p, leg, "a-model", rows=ROWS, hidden_size=HIDDEN, max_length=64, max_bytes=2**20, **asked
        )
        try:
            await client(hop)
        finally:
            hop.abandon()

    asyncio.run(run())


async def nothing(hop: Hop) -> None:
    """Only opens it."""


def test_what_it_asks_for_when_it_opens() -> None:
    told: dict[str, Any] = {}

    async def node(stream: MessageStream) -> None:
        told.update(await opened(stream, reused=16))

    async def client(hop: Hop) -> None:
        assert hop.reused == 16
        assert told["session_id"] == hop.session_id

    talk(node, client, left_padding=(0, 5), prefix=(b"context", [b"names", b"names"]), adapter="mine", wait=1.5)
    expected = {"max_length": 64, "left_padding": [0, 5], "prefix_context": b"context"}
    expected |= {"page_names": [b"names", b"names"], "active_adapter": "mine", "alloc_timeout": 1.5}
    assert {name: told[name] for name in expected} == expected


@pytest.mark.parametrize("error", [OutOfCacheError("full"), BadRequestError("too long")])
def test_a_refusal_keeps_its_class(error: RemoteError) -> None:
    async def node(stream: MessageStream) -> None:
        await stream.receive(Request)
        raise error

    with pytest.raises(type(error), match=str(error)):
        talk(node, nothing)


def test_a_node_that_says_nothing_or_goes_is_lost() -> None:
    async def silent(stream: MessageStream) -> None:
        await asyncio.sleep(5)

    async def gone(stream: MessageStream) -> None:
        await stream.receive(Request)

    with pytest.raises(PeerLostError, match="does not answer"):
        talk(silent, nothing, timeout=0.05)
    with pytest.raises(PeerLostError):
        talk(gone, nothing)


def test_steps_and_their_answers() -> None:
    async def node(stream: MessageStream) -> None:
        await opened(stream)
        first, hidden = await step(stream)
        second, _ = await step(stream)
        assert (first["start"], second["start"]) == (0, 4)
        assert [list(hop) for hop in first["next_servers"]] == [[peer("next").to_base58(), "theirs", 4, 8]]
        await stream.send(reply(hidden * 3, step_id="b", queue_s=0.5, compute_s=0.25))
        await stream.send(reply(hidden * 2, step_id="a"))
        await stream.receive(Request)

    async def client(hop: Hop) -> None:
        behind: Any = type("Behind", (), {"peer_id": peer("next"), "session_id": "theirs", "start": 4, "end": 8})
        await hop.send("a", 0, inputs(4), None, [behind])
        await hop.send("b", 4, inputs(4), None, ())
        assert not hop.has_answered("never sent")
        first, second = await hop.reply("a", 5), await hop.reply("b", 5)
        assert first is not None
        assert second is not None
        assert torch.equal(first, inputs(4) * 2)
        assert torch.equal(second, inputs(4) * 3)
        times = hop.answered("b")
        assert times is not None
        assert times[1:] == (0.5, 0.25)
        hop.forget("a")
        assert not hop.has_answered("a")

    talk(node, client)


def test_answers_without_names_come_in_order() -> None:
    """As Petals' servers answer."""

    async def node(stream: MessageStream) -> None:
        await opened(stream)
        for factor in (2, 3):
            _, hidden = await step(stream)
            await stream.send(reply(hidden * factor))
        await stream.receive(Request)

    async def client(hop: Hop) -> None:
        for name, factor in (("a", 2), ("b", 3)):
            await hop.send(name, 0, inputs(1), None, ())
            output = await hop.reply(name, 5)
            assert output is not None
            assert torch.equal(output, inputs(1) * factor)

    talk(node, client)


def test_silence_is_none_and_a_failed_push_is_told() -> None:
    failed: list[str] = []

    async def node(stream: MessageStream) -> None:
        await opened(stream)
        await step(stream)
        await stream.send(Response(metadata=rpc.dump({"push_failed": "a"})))
        await stream.receive(Request)

    async def client(hop: Hop) -> None:
        hop.on_push_failed = failed.append
        await hop.send("a", 0, inputs(1), None, ())
        assert await hop.reply("a", 0.1) is None
        assert failed == ["a"]

    talk(node, client)


@pytest.mark.parametrize(
    "answer",
    [
        reply(torch.full((ROWS, 1, HIDDEN), float("nan")), step_id="a"),
        reply(torch.zeros(ROWS + 1, 1, HIDDEN), step_id="a"),
        reply(torch.zeros(ROWS, 1, HIDDEN + 1), step_id="a"),
        reply(torch.zeros(ROWS, 1, HIDDEN, dtype=torch.int64), step_id="a"),
        Response(metadata=rpc.dump({"step_id": "a"})),
    ],
)
def test_nonsense_fails_the_hop(answer: Response) -> None:
    async def node(stream: MessageStream) -> None:
        await opened(stream)
        await step(stream)
        await stream.send(answer)
        await stream.receive(Request)

    async def client(hop: Hop) -> None:
        await hop.send("a", 0, inputs(1), None, ())
        with pytest.raises(RemoteError, match="answered"):
            await hop.reply("a", 5)
        with pytest.raises(RemoteError, match="answered"):  # and it says why from then on
            await hop.send("b", 1, inputs(1), None, ())

    talk(node, client)


def test_what_ends_the_session_is_raised_for_each_step() -> None:
    async def node(stream: MessageStream) -> None:
        await opened(stream)
        await step(stream)
        raise OutOfCacheError("full")

    async def client(hop: Hop) -> None:
        hop.expect("pushed")
        await hop.send("a", 0, inputs(1), None, ())
        for name in ("a", "pushed"):
            with pytest.raises(OutOfCacheError):
                await hop.reply(name, 5)

    talk(node, client)


def test_inputs_go_in_the_dtype_of_the_node() -> None:
    seen: list[torch.dtype] = []

    async def node(stream: MessageStream) -> None:
        await opened(stream)
        _, hidden = await step(stream)
        seen.append(hidden.dtype)
        await stream.send(reply(hidden, step_id="a"))
        await stream.receive(Request)

    async def client(hop: Hop) -> None:
        await hop.send("a", 0, inputs(1), None, ())
        await hop.reply("a", 5)

    half = replace(LEG.span, info=replace(LEG.span.info, torch_dtype="bfloat16"))
    talk(node, client, replace(LEG, span=half))
    assert seen == [torch.bfloat16]


def test_closing_says_goodbye() -> None:
    ended: list[bool] = []

    async def node(stream: MessageStream) -> None:
        await opened(stream)
        request = await stream.receive(Request)
        ended.append(request is not None and not request.tensors)

    async def client(hop: Hop) -> None:
        await hop.close()
        await asyncio.sleep(0.05)

    talk(node, client)
    assert ended == [True]
