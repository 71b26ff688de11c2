"""A node for strangers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from hivemind.p2p import P2P

from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.node.engine.engine import Engine
from swarm.node.rpc.handler import Handler
from swarm.node.rpc.requests import Served
from tests.models import tiny_model
from tests.node.rpc.scene import HIDDEN, LIMITS, Scene, well


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    source = resolve(str(tiny_model("llama-gqa", layers=2)))
    span = load_span(source, 0, 2, dtype=torch.float32, device="cpu")
    engine = Engine(span, cache_tokens=512)
    engine.start()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> tuple[P2P, P2P, Handler]:
        node = await P2P.create(nat_port_map=False)
        handler = Handler(node, engine, Served("m", 0, 2, HIDDEN, torch.float32), LIMITS)
        await handler.register()
        address = [str(address) for address in await node.get_visible_maddrs()]
        return node, await P2P.create(initial_peers=address, nat_port_map=False), handler

    node, stranger, handler = asyncio.run_coroutine_threadsafe(start(), loop).result()
    scene = Scene(loop, engine, handler, node, stranger)
    yield scene
    scene.run(handler.leave(1.0))
    scene.run(stranger.shutdown())
    scene.run(node.shutdown())
    engine.stop()
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="module")
def right(scene: Scene) -> torch.Tensor:
    return well(scene)
