"""A node and a stranger that sends it what it likes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P
from hivemind.proto import runtime_pb2

from swarm.errors import SwarmError
from swarm.node.engine.engine import Engine
from swarm.node.rpc.handler import Handler
from swarm.node.rpc.limits import Limits
from swarm.wire import rpc
from swarm.wire.codec import decode, encode
from swarm.wire.records import span_uid
from swarm.wire.stream import MessageStream

Request, Response = runtime_pb2.ExpertRequest, runtime_pb2.ExpertResponse
T = TypeVar("T")
HIDDEN = 64
LIMITS = Limits(max_length=128, max_rows=8, max_step_tokens=256, max_waiting_steps=4, step_timeout=20.0)
EMPTY, EMPTY_INT64 = encode(rpc.EMPTY), encode(rpc.EMPTY_INT64)


@dataclass
class Scene:
    """A node and a stranger, in an event loop in a thread."""

    loop: asyncio.AbstractEventLoop
    engine: Engine
    handler: Handler
    node: P2P
    stranger: P2P

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, 30), self.loop).result()

    async def open(self, method: str = rpc.INFERENCE) -> MessageStream:
        _, reader, writer = await self.stranger.call_binary_stream_handler(self.node.peer_id, rpc.handle_name(method))
        return MessageStream(reader, writer, max_bytes=2**24)


def step(hidden: torch.Tensor, start: int, *, uid: str | None = None, **fields: Any) -> runtime_pb2.ExpertRequest:
    metadata = {"start": start, **({"max_length": 64} if start == 0 else {}), **fields}
    tensors = [encode(hidden), EMPTY, EMPTY_INT64]
    return Request(uid=span_uid("m", 0, 2) if uid is None else uid, tensors=tensors, metadata=rpc.dump(metadata))


async def converse(scene: Scene, requests: list[runtime_pb2.ExpertRequest]) -> list[torch.Tensor | SwarmError]:
    """Sends the requests one after the other; what came back, up to the first error."""
    stream = await scene.open()
    answers: list[torch.Tensor | SwarmError] = []
    try:
        for request in requests:
            await stream.send(request)
            response = await stream.receive(Response)
            if response is None:
                break
            answers.append(decode(response.tensors[0], max_elements=2**20))
    except SwarmError as error:
        answers.append(error)
    finally:
        stream.close()
    return answers


async def settle(scene: Scene) -> None:
    """Waits until the node has noticed that its strangers are gone."""
    while scene.engine.stats().sessions:
        await asyncio.sleep(0.005)


def well(scene: Scene) -> torch.Tensor:
    """A good session's outputs; the node must give them at any time."""
    hidden = torch.linspace(-1, 1, 3 * HIDDEN).view(1, 3, HIDDEN)
    answers = scene.run(converse(scene, [step(hidden[:, :2], 0), step(hidden[:, 2:], 2)]))
    assert all(isinstance(answer, torch.Tensor) for answer in answers), answers
    return torch.cat([answer for answer in answers if isinstance(answer, torch.Tensor)], dim=1)


def still_well(scene: Scene, right: torch.Tensor) -> None:
    assert torch.equal(well(scene), right)
    scene.run(settle(scene))
    assert scene.engine.stats().cache_tokens_free == scene.engine.stats().cache_tokens
