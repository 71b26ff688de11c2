"""Forward and backward without a session, for hidden states, scoring and fine-tuning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from swarm import rpc
from swarm.client.routing import Leg
from swarm.client.settings import ClientSettings
from swarm.client.swarm_view import SwarmView
from swarm.codec import all_finite, decode, encode, join, split
from swarm.errors import BadRequestError, PeerLostError, RemoteError, SwarmError, from_wire
from swarm.records import span_uid
from swarm.rpc import Request, Response
from swarm.stream import MessageStream

_EMPTY = encode(rpc.EMPTY)


async def forward(
    view: SwarmView,
    settings: ClientSettings,
    hidden: torch.Tensor,
    first: int,
    last: int,
    adapter: str | None = None,
) -> tuple[torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
    """Runs ``hidden`` ``[B, T, H]`` through the blocks ``first:last``; a leg that fails is taken by other nodes.
    With ``adapter``, nodes that have it compute that LoRA adapter too.

    Returns:
        The output, and each leg's ``(start, end, input)``.

    Raises:
        MissingBlocksError: blocks were missing for longer than the client waits.
    """
    done: list[tuple[int, int, torch.Tensor]] = []
    refused = 0
    while first < last:
        for leg in await view.route(first, last, adapter=adapter):
            try:
                (output,) = await _call(view, settings, leg, rpc.FORWARD, [hidden], hidden.shape, adapter)
            except SwarmError as error:
                view.failed(leg.peer_id)
                refused += isinstance(error, BadRequestError)
                if refused > 1:
                    raise
                break  # find a new way from this leg's first block on
            view.succeeded(leg.peer_id)
            done.append((leg.start, leg.end, hidden))
            hidden, first = output, leg.end
    return hidden, done


async def backward(
    view: SwarmView,
    settings: ClientSettings,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    first: int,
    last: int,
    adapter: str | None = None,
) -> torch.Tensor:
    """The gradient ``[B, T, H]`` with respect to ``hidden``, given that of the blocks' output.

    Nodes keep nothing between a forward and a backward, so that any node can do either.
    """
    _, legs = await forward(view, settings, hidden, first, last, adapter)
    refused = 0
    while legs:
        start, end, inputs = legs.pop()
        route = await view.route(start, end, adapter=adapter)
        if len(route) > 1:  # the node that did this leg is gone: several share it now
            _, parts = await forward(view, settings, inputs, start, end, adapter)
            legs.extend(parts)
            continue
        try:
            grad, *_ = await _call(view, settings, route[0], rpc.BACKWARD, [inputs, grad], inputs.shape, adapter)
        except SwarmError as error:
            view.failed(route[0].peer_id)
            refused += isinstance(error, BadRequestError)
            if refused > 1:
                raise
            legs.append((start, end, inputs))
    return grad


async def _call(
    view: SwarmView,
    settings: ClientSettings,
    leg: Leg,
    method: str,
    tensors: Sequence[torch.Tensor],
    expected: Sequence[int],
    adapter: str | None,
) -> list[torch.Tensor]:
    encoded = [*(encode(tensor) for tensor in tensors), _EMPTY]
    metadata = rpc.dump({"active_adapter": adapter} if adapter else {})
    request = Request(uid=span_uid(view.prefix, leg.start, leg.end), tensors=encoded, metadata=metadata)
    large = sum(len(tensor.buffer) for tensor in encoded) > rpc.MAX_UNARY_BYTES
    elements = 1
    for size in expected:
        elements *= size
    call = _stream if large else _unary
    try:
        messages = await asyncio.wait_for(
            call(view.peer.p2p, leg.peer_id, method, request, elements), settings.step_timeout
        )
        outputs = [decode(message, max_elements=elements) for message in messages]
    except asyncio.TimeoutError as error:
        raise PeerLostError(f"{leg.peer_id} does not answer") from error
    if not outputs or tuple(outputs[0].shape) != tuple(expected) or not all_finite(outputs[0]):
        raise RemoteError(f"{leg.peer_id} answered nonsense")
    return outputs


async def _unary(p2p: P2P, peer_id: PeerID, method: str, request: Request, elements: int) -> list[runtime_pb2.Tensor]:
    try:
        response = await p2p.call_protobuf_handler(peer_id, rpc.handle_name(method), request, Response)
    except Exception as error:
        raise from_wire(str(error)) from error
    return list(response.tensors)


async def _stream(p2p: P2P, peer_id: PeerID, method: str, request: Request, elements: int) -> list[runtime_pb2.Tensor]:
    try:
        _, reader, writer = await p2p.call_binary_stream_handler(peer_id, rpc.handle_name(f"{method}_stream"))
    except Exception as error:
        raise PeerLostError(f"can't reach {peer_id}: {error}") from error
    limit = 4 * elements + 2**20
    stream = MessageStream(reader, writer, max_bytes=limit)
    try:
        for tensor in request.tensors:
            for part in split(tensor):
                await stream.send(Request(uid=request.uid, metadata=request.metadata, tensors=[part]))
        await stream.send_end()
        return await join(_parts(stream), max_bytes=limit)
    finally:
        stream.close()


async def _parts(stream: MessageStream) -> AsyncIterator[runtime_pb2.Tensor]:
    try:
        while (response := await stream.receive(Response)) is not None:
            for tensor in response.tensors:
                yield tensor
    except PeerLostError:
        return  # hivemind's servers close the stream without saying that they are done; what is missing is noticed
