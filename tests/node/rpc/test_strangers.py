"""What one stranger can take of a node is bounded, and given back; others are served meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError

from swarm.errors import BadRequestError, OutOfCacheError
from swarm.node.rpc import budget as budget_module
from swarm.node.rpc import handler as handler_module
from swarm.node.rpc import pusher as pusher_module
from swarm.node.rpc.budget import Quota
from swarm.wire import rpc, stream
from swarm.wire.stream import MessageStream
from tests.node.rpc.scene import HIDDEN, Request, Response, Scene, converse, step, still_well

ONE, OTHER = PeerID(b"one"), PeerID(b"other")
HID = torch.zeros(1, 1, HIDDEN)
LARGE = 300_000  # bytes; too many to be free
Head = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def raw(scene: Scene, method: str = rpc.INFERENCE) -> Head:
    _, reader, writer = await scene.stranger.call_binary_stream_handler(scene.node.peer_id, rpc.handle_name(method))
    return reader, writer


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def taken(scene: Scene, quota: Quota) -> int:
    return quota._taken[scene.stranger.peer_id]


def test_whatever_can_not_be_read_ends_the_session(scene: Scene, right: torch.Tensor) -> None:
    for hops in ([(5, "s", 0, 1)], [("2" * 90_000, "s", 0, 1)], [("Qm" + "1" * 44, "s", 0, 1)] * 1000):
        error = scene.run(converse(scene, [step(HID, 0), step(HID, 1, next_servers=hops)]))[-1]
        assert isinstance(error, BadRequestError)
        still_well(scene, right)


def test_half_messages_have_a_share_of_the_memory_and_an_end(
    scene: Scene, right: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = scene.handler._shared.budget._memory
    monkeypatch.setattr(memory, "_of_one", 3 * LARGE)
    monkeypatch.setattr(stream, "_STUCK_SECONDS", 0.5)
    monkeypatch.setattr(handler_module, "_LOOK_SECONDS", 0.1)

    async def attack() -> None:
        streams = [await raw(scene) for _ in range(8)]
        for _, writer in streams:
            writer.write(b"\0" + LARGE.to_bytes(8, "big") + b"x" * 1000)
        await until(lambda: taken(scene, memory) == 3 * LARGE)
        waiting = len(memory._taken)
        assert waiting == 1
        for reader, _ in streams[:3]:
            await reader.read()  # each has been ended
        await until(lambda: not memory._taken)
        for _, writer in streams:
            writer.close()

    # the node looks for stuck streams every five seconds by now, so the test waits for the next look
    scene.run(attack())
    still_well(scene, right)


def test_streams_are_counted(scene: Scene, right: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = scene.handler._shared.budget.streams
    monkeypatch.setattr(streams, "_of_one", 3)

    async def attack() -> None:
        held = [await raw(scene) for _ in range(3)]
        await until(lambda: taken(scene, streams) == 3)
        reader, writer = await raw(scene)
        with pytest.raises(OutOfCacheError, match="another stream"):
            await MessageStream(reader, writer, max_bytes=2**20).receive(Response)
        for _, each in held:
            each.close()
        await until(lambda: not streams._taken)

    scene.run(attack())
    still_well(scene, right)


def test_calls_are_counted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.handler._shared.budget.calls, "_of_one", 0)
    monkeypatch.setattr(scene.handler._shared.budget.calls, "_most", 0)

    async def call() -> None:
        name = rpc.handle_name(rpc.FORWARD)
        await scene.stranger.call_protobuf_handler(scene.node.peer_id, name, step(HID, 0), Response)

    with pytest.raises(P2PHandlerError, match="another request"):
        scene.run(call())


def test_what_is_not_looked_at_is_not_passed_on_and_a_black_hole_holds_little(
    scene: Scene, right: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pusher_module, "_MAX_WAITING_FOR_ONE", 2)
    pushed: list[Any] = []

    async def attack() -> None:
        async def sink(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received = await MessageStream(reader, writer, max_bytes=2**20).receive(Request)
            pushed.append(received)
            await asyncio.sleep(60)

        await scene.stranger.add_binary_stream_handler(rpc.handle_name(rpc.PUSH_STREAM), sink)
        session = await scene.open()
        hops = [(scene.stranger.peer_id.to_base58(), "x", 0, 2)]
        for number in range(3):
            request = step(HID, number, step_id=str(number), next_servers=hops)
            request.tensors.append(request.tensors[0])
            await session.send(request)
            assert await session.receive(Response) is not None
        await until(lambda: pushed)
        assert len(pushed[0].tensors) == 3
        session.close()
        await scene.stranger.remove_binary_stream_handler(rpc.handle_name(rpc.PUSH_STREAM))

    scene.run(attack())
    still_well(scene, right)


def test_only_who_was_named_may_push(scene: Scene, right: torch.Tensor) -> None:
    async def attack(named: str | None) -> int:
        """How many answers the session's client got, for a step that the stranger has pushed."""
        other = await P2P.create(
            initial_peers=list(map(str, await scene.node.get_visible_maddrs())), nat_port_map=False
        )
        name = rpc.handle_name(rpc.INFERENCE)
        _, reader, writer = await other.call_binary_stream_handler(scene.node.peer_id, name)
        session = MessageStream(reader, writer, max_bytes=2**20)
        fields = {} if named is None else {"pusher": named}
        await session.send(step(HID[:, :0], 0, session_id="s", **fields))
        assert await session.receive(Response) is not None
        push = step(HID, 0, session_id="s", step_id="pushed", pushed=True, pusher=scene.stranger.peer_id.to_base58())
        await scene.stranger.call_protobuf_handler(scene.node.peer_id, rpc.handle_name(rpc.PUSH), push, Response)
        await session.send(step(HID[:, :0], 0, step_id="last"))
        answers = 0
        while (response := await session.receive(Response)) is not None:
            answers += 1
            if rpc.load(response.metadata)["step_id"] == "last":
                break
        session.close()
        await other.shutdown()
        return answers

    assert scene.run(attack(scene.stranger.peer_id.to_base58())) == 2
    assert scene.run(attack(None)) == 2
    assert scene.run(attack(scene.node.peer_id.to_base58())) == 1
    still_well(scene, right)


def test_a_quota() -> None:
    async def run() -> None:
        quota = Quota(10, 4)
        assert quota.take(ONE, 7)  # who has nothing may have more than its share
        assert not quota.take(ONE, 1)
        assert quota.take(OTHER, 3)
        assert not quota.take(OTHER, 1)
        waiting = asyncio.ensure_future(quota.wait(OTHER, 1))
        await asyncio.sleep(0)
        quota.give_back(ONE, 7)
        await asyncio.wait_for(waiting, 5)
        quota.give_back(OTHER, 4)
        assert not quota._taken
        assert quota.take(ONE, 10)

    asyncio.run(run())


def test_who_waits_in_vain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "_WAIT_SECONDS", 0.05)

    async def run() -> None:
        quota = Quota(2, 1)
        assert quota.take(ONE, 2)
        with pytest.raises(OutOfCacheError, match="no memory"):
            await quota.wait(OTHER, 1)

    asyncio.run(run())
