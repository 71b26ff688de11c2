"""Passes without a session, over peers without a network: divided by rows, and done by others where one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID

from swarm.client.session import parallel
from swarm.client.settings import ClientSettings
from swarm.errors import BadRequestError, InputError, MissingBlocksError, RemoteError, SwarmError
from swarm.network.dht import RemoteSpan
from swarm.wire import rpc
from swarm.wire.codec import decode, encode, join, split
from swarm.wire.limits import MessageLimits, limits_of
from swarm.wire.records import parse_span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream
from tests.client.routing.test_routing import peer, span
from tests.client.session.fakes import FakeView
from tests.loopback import LoopbackP2P

HIDDEN = 3
SPANS = [span("a", 0, 4, rps=300), span("b", 4, 8, rps=300), span("c", 4, 8, rps=100)]


class Nodes(FakeView):
    """A swarm whose nodes add their blocks' numbers; a gradient is multiplied by 2 for each block."""

    prefix = "a-model"

    def __init__(self, spans: Sequence[RemoteSpan], most: MessageLimits | None = None) -> None:
        super().__init__(spans)
        self.most = most
        self.calls: list[tuple[PeerID, str, tuple[int, ...]]] = []
        self.errors: dict[PeerID, list[SwarmError]] = {}
        self.p2p = LoopbackP2P(
            {
                rpc.handle_name(f"{rpc.FORWARD}_stream"): self._forward_stream,
            },
            {rpc.handle_name(rpc.FORWARD): self._forward, rpc.handle_name(rpc.BACKWARD): self._backward},
        )

    def limits(self, first: int, last: int) -> MessageLimits:
        return self.most or limits_of(self.spans[0].info)

    def _take(self, peer_id: PeerID, method: str, request: Any) -> tuple[list[torch.Tensor], range]:
        tensors = [decode(tensor, max_elements=10**7) for tensor in request.tensors]
        self.calls.append((peer_id, method, tuple(tensors[0].shape)))
        if self.errors.get(peer_id):
            raise self.errors[peer_id].pop(0)
        return tensors, range(*parse_span_uid(request.uid, self.prefix))

    async def _forward(self, peer_id: PeerID, request: Any) -> Response:
        tensors, blocks = self._take(peer_id, "forward", request)
        return Response(tensors=[encode(tensors[0] + sum(blocks))])

    async def _backward(self, peer_id: PeerID, request: Any) -> Response:
        tensors, blocks = self._take(peer_id, "backward", request)
        return Response(tensors=[encode(tensors[1] * 2 ** len(blocks))])

    async def _forward_stream(self, peer_id: PeerID, stream: MessageStream) -> None:
        head = Request()

        async def parts() -> Any:
            while (request := await stream.receive(Request)) is not None:
                head.uid = head.uid or request.uid
                for tensor in request.tensors:
                    yield tensor

        tensors = await join(parts(), max_bytes=2**26)
        response = await self._forward(peer_id, Request(uid=head.uid, tensors=tensors))
        for tensor in response.tensors:
            for part in split(tensor):
                await stream.send(Response(tensors=[part]))
        await stream.send_end()


def inputs(rows: int = 2, columns: int = 5, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.arange(rows * columns * hidden, dtype=torch.float32).reshape(rows, columns, hidden)


def forward(view: Nodes, hidden: torch.Tensor, wait_timeout: float = 5.0) -> torch.Tensor:
    settings = ClientSettings(wait_timeout=wait_timeout)
    return asyncio.run(parallel.forward(view, settings, hidden, 0, 8))  # type: ignore[arg-type]


def test_all_blocks_by_the_quickest_nodes() -> None:
    view = Nodes(SPANS)
    assert torch.equal(forward(view, inputs()), inputs() + sum(range(8)))
    assert [peer_id for peer_id, _, _ in view.calls] == [peer("a"), peer("b")]
    assert view.good == [peer("a"), peer("b")]


def test_rows_are_divided_by_what_a_message_takes() -> None:
    view = Nodes(SPANS, most=MessageLimits(rows=3, tokens=12))
    hidden = inputs(rows=7)
    assert torch.equal(forward(view, hidden), hidden + sum(range(8)))
    shapes = [shape for peer_id, _, shape in view.calls if peer_id == peer("a")]
    assert sum(shape[0] for shape in shapes) == 7
    assert max(shape[0] for shape in shapes) == 2  # two rows of five tokens fit, three don't


def test_a_row_that_no_message_takes_is_refused_before_anything_is_sent() -> None:
    view = Nodes(SPANS, most=MessageLimits(rows=3, tokens=4))
    with pytest.raises(InputError, match="use a session"):
        forward(view, inputs())
    assert not view.calls


def test_another_node_takes_the_place_of_one_that_fails() -> None:
    view = Nodes(SPANS)
    view.errors[peer("b")] = [RemoteError("broken")]
    assert torch.equal(forward(view, inputs()), inputs() + sum(range(8)))
    assert [peer_id for peer_id, _, _ in view.calls] == [peer("a"), peer("b"), peer("c")]
    assert set(view.left_out) == {peer("b")}


def test_one_refusal_asks_another_and_two_end_it() -> None:
    view = Nodes(SPANS)
    view.errors[peer("b")] = [BadRequestError("no")]
    assert torch.equal(forward(view, inputs()), inputs() + sum(range(8)))
    view.errors = {peer("b"): [BadRequestError("no")], peer("c"): [BadRequestError("no")]}
    with pytest.raises(BadRequestError):
        forward(view, inputs())
    assert not view.left_out  # the caller's fault is held against nobody


def test_nobody_left() -> None:
    view = Nodes(SPANS[:2])
    view.p2p.unreachable.add(peer("b"))
    with pytest.raises(MissingBlocksError):
        forward(view, inputs(), wait_timeout=0.0)


def test_a_large_message_goes_in_parts() -> None:
    hidden = inputs(rows=1, columns=64, hidden=2 * rpc.MAX_UNARY_BYTES // (4 * 64))
    view = Nodes(SPANS)
    assert torch.equal(forward(view, hidden), hidden + sum(range(8)))
    assert view.p2p.opened == 2


def test_gradients_go_back_leg_by_leg_and_around_one_that_fails() -> None:
    view = Nodes(SPANS)
    view.errors[peer("b")] = []
    settings = ClientSettings(wait_timeout=5.0)

    def backward() -> torch.Tensor:
        return asyncio.run(parallel.backward(view, settings, inputs(), torch.ones_like(inputs()), 0, 8))  # type: ignore[arg-type]

    assert torch.equal(backward(), torch.full_like(inputs(), 2.0**8))
    view.calls.clear()

    async def broken(peer_id: PeerID, request: Any) -> Response:
        if peer_id == peer("b"):
            raise RemoteError("broken")
        return await view._backward(peer_id, request)

    view.p2p.answers[rpc.handle_name(rpc.BACKWARD)] = broken
    assert torch.equal(backward(), torch.full_like(inputs(), 2.0**8))
    assert [peer_id for peer_id, method, _ in view.calls if method == "backward"] == [peer("c"), peer("a")]


def test_nonsense_is_not_believed() -> None:
    view = Nodes(SPANS)

    async def other_shape(peer_id: PeerID, request: Any) -> Response:
        if peer_id == peer("b"):
            return Response(tensors=[encode(torch.full((1, 1, HIDDEN), float("nan")))])
        return await view._forward(peer_id, request)

    view.p2p.answers[rpc.handle_name(rpc.FORWARD)] = other_shape
    assert torch.equal(forward(view, inputs()), inputs() + sum(range(8)))
    assert set(view.left_out) == {peer("b")}
