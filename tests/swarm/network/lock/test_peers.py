"""Locked peers over real daemons: they find each other again after restarts, and while the key is changed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2PContext, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.dht_pb2 import PingRequest

from swarm.errors import LockedError
from swarm.network.clock import CLOCK
from swarm.network.lock.key import SwarmKey
from swarm.network.options import KeyOptions
from swarm.network.peer import Peer, PeerOptions
from tests.swarm_e2e.nodes import free_port

KEY, OLD = SwarmKey.new(), SwarmKey.new()


async def say(request: PingRequest, context: P2PContext) -> PingRequest:
    return PingRequest(validate=not request.validate)


async def fail(request: PingRequest, context: P2PContext) -> PingRequest:
    raise RuntimeError("[swarm:leaving] no more work")


async def shout(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line.upper())


@asynccontextmanager
async def peer(*keys: SwarmKey, by: Peer | None = None, **options: Any) -> AsyncIterator[Peer]:
    initial_peers = () if by is None else by.addresses[:1]
    key = KeyOptions(swarm_key=keys)
    started = await Peer.start(PeerOptions(host="127.0.0.1", initial_peers=initial_peers, key=key, **options))
    try:
        if not options.get("client"):
            await started.p2p.add_protobuf_handler("say", say, PingRequest)
            await started.p2p.add_protobuf_handler("fail", fail, PingRequest)
            await started.p2p.add_binary_stream_handler("shout", shout)
        yield started
    finally:
        await started.stop()


async def talk(asking: Peer, asked: Peer) -> None:
    """Both forms of calls reach the other peer, which is given some time to be there again."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        try:
            answer = await asking.p2p.call_protobuf_handler(asked.peer_id, "say", PingRequest(), PingRequest)
            _, reader, writer = await asking.p2p.call_binary_stream_handler(asked.peer_id, "shout")
            break
        except Exception:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.1)
    assert answer.validate
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.readline(), 10) == b"HELLO\n"
    writer.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 90))


def test_members_talk_and_errors_come_through() -> None:
    async def work() -> None:
        async with peer(KEY) as first, peer(KEY, by=first) as second:
            await talk(second, first)
            await talk(first, second)
            assert await second.dht.store("key", "value", CLOCK.now() + 60, subkey="name")
            found = await first.dht.get("key")
            assert found is not None
            assert found.value["name"].value == "value"
            for name, words in (("fail", r"\[swarm:leaving\] no more work"), ("none", "not supported")):
                with pytest.raises(P2PHandlerError, match=words):
                    await second.p2p.call_protobuf_handler(first.peer_id, name, PingRequest(), PingRequest)
            with pytest.raises(P2PHandlerError, match="not supported"):
                await second.p2p.call_binary_stream_handler(first.peer_id, "none")
            assert first.lock is not None
            assert not any(first.lock.refused.values())

    run(work)


def test_a_key_is_changed_with_an_overlap() -> None:
    async def work() -> None:
        async with peer(KEY, OLD) as both, peer(OLD, by=both) as old, peer(KEY, by=both) as new:
            await talk(old, both)
            await talk(new, both)
            await talk(both, old)
            with pytest.raises(Exception, match="not the key"):
                await new.p2p.call_protobuf_handler(old.peer_id, "say", PingRequest(), PingRequest)

    run(work)


def test_who_was_started_again_is_met_again(tmp_path: Path) -> None:
    async def work() -> None:
        given = {"identity": tmp_path / "identity", "port": free_port()}
        async with AsyncExitStack() as stack:
            async with peer(KEY, **given) as first:
                second = await stack.enter_async_context(peer(KEY, by=first))
                await talk(second, first)
            async with peer(KEY, **given) as first:
                await talk(second, first)
                assert second.lock is not None
                assert second.lock.denied is None

    run(work)


def test_a_daemon_that_is_killed_changes_nothing() -> None:
    async def work() -> None:
        async with peer(KEY) as first, peer(KEY, by=first) as second:
            await talk(second, first)
            os.kill(first.p2p._child.pid, signal.SIGKILL)
            while not first.restarts:
                await asyncio.sleep(0.1)
            await talk(second, first)

    run(work)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ((KEY,), (), "this swarm is locked: give its key"),
        ((KEY,), (OLD,), "not the key of this swarm"),
        ((), (KEY,), "this swarm is open"),
    ],
)
def test_who_has_no_key_or_another_one_is_told(
    theirs: tuple[SwarmKey, ...], ours: tuple[SwarmKey, ...], words: str
) -> None:
    async def work() -> None:
        async with peer(*theirs) as first:
            for client in (True, False):
                with pytest.raises(LockedError, match=words):
                    async with peer(*ours, by=first, client=client):
                        pass
            if first.lock is not None:
                assert sum(first.lock.refused.values()) >= 2

    run(work)
