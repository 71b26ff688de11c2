"""Forward and backward passes without a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import BadRequestError
from swarm.wire.codec import join, split
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from .budget import Turns
from .requests import read_dense
from .shared import Shared

Answer = Callable[[Request], Awaitable[Response]]


class DensePasses:
    """``rpc_forward`` and ``rpc_backward``, and their streaming variants."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._reading = Turns()  # halves of several requests would wait for each other's memory

    async def forward(self, request: Request) -> Response:
        """The blocks' output."""
        self._shared.refuse_if_leaving()
        asked = read_dense(request, self._shared.served, self._shared.limits, backward=False)
        output = await self._run(
            self._shared.engine.forward(
                asked.hidden, first=asked.first, last=asked.last, prompts=asked.prompts, adapter=asked.adapter
            )
        )
        return Response(tensors=asked.encode([output]))

    async def backward(self, request: Request) -> Response:
        """The gradients of the inputs and, if there are some, of the prompts."""
        self._shared.refuse_if_leaving()
        asked = read_dense(request, self._shared.served, self._shared.limits, backward=True)
        assert asked.grad is not None
        grads = await self._run(
            self._shared.engine.backward(
                asked.hidden,
                asked.grad,
                first=asked.first,
                last=asked.last,
                prompts=asked.prompts,
                adapter=asked.adapter,
            )
        )
        return Response(tensors=asked.encode([tensor for tensor in grads if tensor is not None]))

    def stream_of(self, answer: Answer) -> Callable[[MessageStream, PeerID], Awaitable[None]]:
        """The streaming variant of a unary RPC: the same request and response, cut into parts."""

        async def handle(stream: MessageStream, peer: PeerID) -> None:
            head = Request()

            async def parts(held: ExitStack) -> AsyncIterator[runtime_pb2.Tensor]:
                while (request := await stream.receive(Request)) is not None:
                    held.callback(stream.claim())
                    if request.uid and head.uid and request.uid != head.uid:
                        raise BadRequestError("the parts of a request name different blocks")
                    head.uid = head.uid or request.uid
                    head.metadata = head.metadata or request.metadata
                    for tensor in request.tensors:
                        yield tensor

            limits = self._shared.limits
            limit = 3 * limits.message_bytes(self._shared.served.hidden_size)
            with ExitStack() as held:
                async with self._reading.of(peer):
                    tensors = await asyncio.wait_for(join(parts(held), max_bytes=limit), limits.request_timeout)
                response = await answer(Request(uid=head.uid, metadata=head.metadata, tensors=tensors))
            for tensor in response.tensors:
                for part in split(tensor):
                    await stream.send(Response(tensors=[part]))
            await stream.send_end()

        return handle

    async def _run(self, future: Any) -> Any:
        self._shared.busy += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._shared.busy -= 1
