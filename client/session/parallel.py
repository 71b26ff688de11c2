"""Forward and backward without a session, for hidden states, scoring and fine-tuning."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import InputError, PeerLostError, RemoteError, SwarmError
from swarm.network.reach import call_failed
from swarm.wire import rpc
from swarm.wire.codec import all_finite, decode, encode, join, split
from swarm.wire.limits import divide_rows, limits_of
from swarm.wire.records import span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream

from ..checks import sendable
from ..routing.left_out import Needs
from ..routing.pulse import watched
from ..routing.route import Leg
from ..routing.step_times import UNKNOWN_SECONDS
from ..routing.swarm_view import SwarmView
from ..settings import ClientSettings
from .divided import all_of
from .failures import Failures

_EMPTY = encode(rpc.EMPTY)
_AT_ONCE = 2  # parts of a batch: one is computed while another one travels


async def forward(
    view: SwarmView,
    settings: ClientSettings,
    hidden: torch.Tensor,
    first: int,
    last: int,
    adapter: str | None = None,
) -> torch.Tensor:
    """Runs ``hidden`` ``[B, T, H]`` through the blocks ``first:last``; a leg that fails is taken by other nodes.
    With ``adapter``, nodes that have it compute that LoRA adapter too. A batch that is more than a message takes is
    divided by rows.

    Raises:
        MissingBlocksError: blocks were missing for longer than the client waits.
        InputError: a row is longer than nodes take in one message.
    """

    async def run(part: torch.Tensor) -> torch.Tensor:
        output, _ = await _Pass(view, settings, adapter).forward(part, first, last)
        return output

    return await _in_parts(run, [hidden], view, first, last)


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

    Nodes keep nothing between a forward and a backward, so that any node can do either. Divided as :func:`forward`.
    """

    async def run(part: torch.Tensor, part_grad: torch.Tensor) -> torch.Tensor:
        return await _Pass(view, settings, adapter).backward(part, part_grad, first, last)

    return await _in_parts(run, [hidden, grad], view, first, last)


async def _in_parts(
    work: Callable[..., Awaitable[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    view: SwarmView,
    first: int,
    last: int,
) -> torch.Tensor:
    """``work`` done with as many rows of ``tensors`` as a message takes, and joined."""
    rows, columns, _ = tensors[0].shape
    if not tensors[0].numel():
        return tensors[0]
    limits = view.limits(first, last)
    most = limits.rows_of(columns)
    if not most:
        raise InputError(
            f"a row of {columns} tokens is longer than the {limits.tokens} that nodes take in one message: shorten it, "
            "or use a session (model.session, generate), which sends it piece by piece"
        )
    at_once = asyncio.Semaphore(_AT_ONCE)

    async def run(part: slice) -> torch.Tensor:
        async with at_once:
            return await work(*(sendable(tensor[part]) for tensor in tensors))

    outputs = await all_of(run(part) for part in divide_rows(rows, most))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Pass:
    """One part of a batch, there and maybe back."""

    def __init__(self, view: SwarmView, settings: ClientSettings, adapter: str | None) -> None:
        self._view, self._settings, self._adapter = view, settings, adapter
        self._failures = Failures(view, settings)

    async def forward(
        self, hidden: torch.Tensor, first: int, last: int
    ) -> tuple[torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
        """The output, and each leg's ``(start, end, input)``."""
        done: list[tuple[int, int, torch.Tensor]] = []
        while first < last:
            for leg in await self._route(first, last, hidden):
                output = await self._try(leg, rpc.FORWARD, [hidden])
                if output is None:
                    break  # find a new way from this leg's first block on
                self._failures.progress(leg.end)
                done.append((leg.start, leg.end, hidden))
                hidden, first = output, leg.end
        return hidden, done

    async def backward(self, hidden: torch.Tensor, grad: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The gradient with respect to ``hidden``."""
        _, legs = await self.forward(hidden, first, last)
        while legs:
            start, end, inputs = legs.pop()
            route = await self._route(start, end, inputs)
            if len(route) > 1:  # the node that did this leg is gone: several share it now
                _, parts = await self.forward(inputs, start, end)
                legs.extend(parts)
                continue
            output = await self._try(route[0], rpc.BACKWARD, [inputs, grad])
            if output is None:
                legs.append((start, end, inputs))
                continue
            self._failures.progress(2 * last - start)
            grad = output
        return grad

    async def _route(self, first: int, last: int, hidden: torch.Tensor) -> tuple[Leg, ...]:
        return await self._failures.route(first, last, self._needs(hidden))

    def _needs(self, hidden: torch.Tensor) -> Needs:
        return Needs(columns=hidden.shape[1], adapter=self._adapter)

    async def _try(self, leg: Leg, method: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What a leg's node makes of ``tensors`` (``[B, T, H]`` each), or None if another one is to be asked."""
        rows, columns, _ = tensors[0].shape
        parts = divide_rows(rows, limits_of(leg.span.info).rows_of(columns))
        try:
            outputs = [await self._call(leg, method, [tensor[part] for tensor in tensors]) for part in parts]
        except SwarmError as error:
            await self._failures.met(leg, error)
            return None
        self._view.succeeded(leg.peer_id)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    async def _call(self, leg: Leg, method: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        encoded = [*(encode(tensor) for tensor in tensors), _EMPTY]
        metadata = rpc.dump({"active_adapter": self._adapter} if self._adapter else {})
        request = Request(uid=span_uid(self._view.prefix, leg.start, leg.end), tensors=encoded, metadata=metadata)
        large = sum(len(tensor.buffer) for tensor in encoded) > rpc.MAX_UNARY_BYTES
        expected = tuple(tensors[0].shape)
        elements = math.prod(expected)
        call = _stream if large else _unary
        needs = self._needs(tensors[0])

        async def worth() -> bool:
            return await self._view.is_worth_waiting(leg.peer_id, leg.start, leg.end, needs)

        calling = call(self._view.peer.p2p, leg.peer_id, method, request, elements)
        try:
            messages = await asyncio.wait_for(
                watched(calling, leg.peer_id, UNKNOWN_SECONDS, worth), self._settings.step_timeout
            )
        except asyncio.TimeoutError as error:
            raise PeerLostError(f"{leg.peer_id} does not answer") from error
        outputs = [decode(message, max_elements=elements) for message in messages]
        if not outputs or tuple(outputs[0].shape) != expected or not all_finite(outputs[0]):
            raise RemoteError(f"{leg.peer_id} answered nonsense")
        return outputs[0]


async def _unary(p2p: P2P, peer_id: PeerID, method: str, request: Request, elements: int) -> list[runtime_pb2.Tensor]:
    try:
        response = await p2p.call_protobuf_handler(peer_id, rpc.handle_name(method), request, Response)
    except Exception as error:
        raise call_failed(error) from error
    return list(response.tensors)


async def _stream(p2p: P2P, peer_id: PeerID, method: str, request: Request, elements: int) -> list[runtime_pb2.Tensor]:
    try:
        _, reader, writer = await p2p.call_binary_stream_handler(peer_id, rpc.handle_name(f"{method}_stream"))
    except Exception as error:
        raise call_failed(error) from error
    limit = 4 * elements + 2**20
    stream = MessageStream(reader, writer, max_bytes=limit)
    try:
        lost: PeerLostError | None = None
        try:
            for tensor in request.tensors:
                for part in split(tensor):
                    await stream.send(Request(uid=request.uid, metadata=request.metadata, tensors=[part]))
            await stream.send_end()
        except PeerLostError as error:
            lost = error  # it may have said why before it closed the stream
        answer = await join(_parts(stream), max_bytes=limit)
        if lost is not None and not answer:
            raise lost
        return answer
    finally:
        stream.close()


async def _parts(stream: MessageStream) -> AsyncIterator[runtime_pb2.Tensor]:
    try:
        while (response := await stream.receive(Response)) is not None:
            for tensor in response.tensors:
                yield tensor
    except PeerLostError:
        return  # hivemind's servers close the stream without saying that they are done; what is missing is noticed
