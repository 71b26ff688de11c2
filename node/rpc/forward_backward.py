"""Forward and backward without a session: one request, one response, each also cut into parts over a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TypeVar

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import BadRequestError
from swarm.wire.codec import COMPRESSIONS, NONE, encode, join, split
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from .refusals import Answer, StreamHandler
from .requests import Message, read_backward, read_forward
from .serving import Serving

T = TypeVar("T")


async def forward(serving: Serving, request: Request) -> Response:
    """Answers with the output, ``[rows, T, H]``."""
    serving.refuse_if_leaving()
    message = Message.of(request)
    wanted = read_forward(message, serving.served, serving.limits)
    output = await _run(serving, serving.engine.forward(**vars(wanted)))
    return _response([output], message)


async def backward(serving: Serving, request: Request) -> Response:
    """Answers with the gradients of the hidden states and, if there were some, of the prompts."""
    serving.refuse_if_leaving()
    message = Message.of(request)
    wanted = read_backward(message, serving.served, serving.limits)
    grads = await _run(serving, serving.engine.backward(**vars(wanted)))
    return _response([tensor for tensor in grads if tensor is not None], message)


def in_parts(serving: Serving, answer: Answer) -> StreamHandler:
    """The streaming variant of a unary RPC: the same request and response, cut into parts."""

    async def handle(stream: MessageStream, _: PeerID) -> None:
        head = Request()

        async def parts() -> AsyncIterator[runtime_pb2.Tensor]:
            while (request := await stream.receive(Request)) is not None:
                if request.uid and head.uid and request.uid != head.uid:
                    raise BadRequestError("the parts of a request name different blocks")
                head.uid = head.uid or request.uid
                head.metadata = head.metadata or request.metadata
                for tensor in request.tensors:
                    yield tensor

        joined = join(parts(), max_bytes=3 * serving.message_bytes)
        tensors = await asyncio.wait_for(joined, serving.limits.request_timeout)
        response = await answer(Request(uid=head.uid, metadata=head.metadata, tensors=tensors))
        for tensor in response.tensors:
            for part in split(tensor):
                await stream.send(Response(tensors=[part]))
        await stream.send_end()

    return handle


async def _run(serving: Serving, future: Future[T]) -> T:
    serving.under_way += 1
    try:
        return await asyncio.wrap_future(future)
    finally:
        serving.under_way -= 1


def _response(outputs: list[torch.Tensor], message: Message) -> Response:
    wanted = message.metadata.output_compression or (NONE,) * len(outputs)
    if len(wanted) != len(outputs) or any(compression not in COMPRESSIONS for compression in wanted):
        raise BadRequestError(f"output_compression is to be {len(outputs)} of {list(COMPRESSIONS)}")
    return Response(tensors=[encode(output, how) for output, how in zip(outputs, wanted, strict=True)])
