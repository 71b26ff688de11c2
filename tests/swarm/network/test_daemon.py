"""The network's daemon: where it runs, and what is left of a peer whose daemon is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import p2pd_pb2
from hivemind.proto.dht_pb2 import PingRequest
from hivemind.utils.timed_storage import get_dht_time

from swarm.errors import DaemonError
from swarm.network.daemon import restart_args
from swarm.network.peer import Peer, PeerOptions, ping

GIVEN = [
    "/p2pd",
    "-b=1",
    "-listen=/unix/tmp/hivemind-p2pd-x.sock",
    "-hostAddrs=/ip4/0.0.0.0/tcp/0,/ip6/::/tcp/0",
    "-bootstrapPeers=/ip4/10.0.0.1/tcp/31330/p2p/QmX",
]


def test_a_port_that_the_daemon_chose_is_asked_for_again_and_it_does_not_bootstrap() -> None:
    relayed = "/ip4/10.0.0.1/tcp/31330/p2p/QmX/p2p-circuit"
    assert restart_args(GIVEN, [relayed, "/ip4/10.0.0.2/tcp/4567", "/ip4/127.0.0.1/tcp/4567"]) == [
        GIVEN[0],
        GIVEN[2],
        "-hostAddrs=/ip4/0.0.0.0/tcp/4567,/ip6/::/tcp/4567",
    ]
    assert restart_args(GIVEN, [relayed]) == [GIVEN[0], *GIVEN[2:4]]
    fixed = [GIVEN[0], "-hostAddrs=/ip4/0.0.0.0/tcp/31330"]
    assert restart_args(fixed, ["/ip4/1.2.3.4/tcp/80"]) == fixed


def run(work: Callable[[Peer, Peer], Awaitable[None]], **options: Any) -> None:
    """``work`` with a peer, and another one that knows it."""

    async def both() -> None:
        first = await Peer.start(PeerOptions(host="127.0.0.1", **options))
        second = await Peer.start(PeerOptions(host="127.0.0.1", initial_peers=first.addresses[:1]))
        try:
            await work(first, second)
        finally:
            await second.stop()
            await first.stop()

    asyncio.run(asyncio.wait_for(both(), 60))


def kill(peer: Peer) -> int:
    """Its daemon, which is there: its PID."""
    pid = int(peer.p2p._child.pid)
    os.kill(pid, signal.SIGKILL)
    return pid


async def say(request: PingRequest, context: P2PContext) -> PingRequest:
    return PingRequest(validate=not request.validate)


async def wait_for_ever(request: PingRequest, context: P2PContext) -> PingRequest:
    await asyncio.sleep(3600)
    return request


async def shout(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line.upper())
    writer.close()


async def hear(peer: Peer, other: PeerID) -> bytes:
    _, reader, writer = await peer.p2p.call_binary_stream_handler(other, "shout")
    writer.write(b"hello\n")
    line = await reader.readline()
    writer.close()
    return line


def listen(port: int) -> socket.socket:
    """Takes a port as soon as it is free."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            time.sleep(0.001)


@pytest.mark.parametrize("named", [False, True])
def test_a_peer_goes_on_with_another_daemon(named: bool, tmp_path: Path) -> None:
    """The same name and port, what it had registered, what the DHT knows; both as who asks and as who is asked."""

    async def work(first: Peer, second: Peer) -> None:
        for peer in (first, second):
            await peer.p2p.add_protobuf_handler("say", say, PingRequest)
            await peer.p2p.add_protobuf_handler("wait", wait_for_ever, PingRequest)
            await peer.p2p.add_binary_stream_handler("shout", shout)
        assert await second.dht.store("key", "value", get_dht_time() + 60, subkey="name")
        for peer, other in ((second, first), (first, second)):
            told: list[Peer] = []

            async def tell(told: list[Peer] = told, peer: Peer = peer) -> None:
                told.append(peer)

            peer.after_restart.append(tell)
            before = peer.peer_id, await peer.p2p.get_visible_maddrs(latest=True)
            waiting = asyncio.ensure_future(
                peer.p2p.call_protobuf_handler(other.peer_id, "wait", PingRequest(), PingRequest)
            )
            await asyncio.sleep(0.1)
            killed = kill(peer)
            with pytest.raises(Exception, match="daemon has ended"):
                await waiting
            assert not peer.p2p.is_up
            await peer.check_daemon()
            assert peer.restarts == 1
            assert peer.p2p._child.pid != killed
            assert (peer.peer_id, await peer.p2p.get_visible_maddrs(latest=True)) == before
            while not told:
                await asyncio.sleep(0.01)
            for asking, asked in ((second, first), (first, second)):  # the first one knows nobody's address
                while await asking.dht.protocol.call_ping(asked.peer_id) is None:
                    await asyncio.sleep(0.05)
                answer = await asking.p2p.call_protobuf_handler(asked.peer_id, "say", PingRequest(), PingRequest)
                assert answer.validate
                assert await hear(asking, asked.peer_id) == b"HELLO\n"
            found = await peer.dht.get("key", latest=True)
            assert found is not None
            assert found.value["name"].value == "value"

    run(work, identity=tmp_path / "key" if named else None)


def test_calls_wait_for_the_daemon_to_be_back() -> None:
    async def work(first: Peer, second: Peer) -> None:
        await first.p2p.add_protobuf_handler("say", say, PingRequest)
        await first.p2p.add_binary_stream_handler("shout", shout)
        second.p2p._child.kill()
        await second.p2p._child.wait()
        await asyncio.sleep(0)
        answer = await second.p2p.call_protobuf_handler(first.peer_id, "say", PingRequest(), PingRequest)
        assert answer.validate
        kill(second)  # and now nobody has noticed yet
        await second.check_daemon()
        assert second.restarts == 2
        assert await hear(second, first.peer_id) == b"HELLO\n"

    run(work)


def test_a_daemon_whose_port_is_taken_meanwhile_is_lost() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def work(first: Peer, second: Peer) -> None:
        kill(first)
        with listen(port), pytest.raises(DaemonError, match=r"can't be started again \(.*address already in use"):
            await first.watch_daemon()
        assert first.restarts == 0
        for call in (first.check_daemon(), hear(first, second.peer_id)):
            with pytest.raises(DaemonError):
                await call

    run(work, port=port)


def test_the_port_of_a_daemon_that_is_ending_is_waited_for() -> None:
    """The one before may be going still: that of a node which was killed, or of an attempt to join that failed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def work() -> None:
            starting = asyncio.create_task(Peer.start(PeerOptions(host="127.0.0.1", port=port)))
            await asyncio.sleep(0.3)
            assert not starting.done()
            taken.close()
            peer = await starting
            assert f"/tcp/{port}/" in peer.addresses[0]
            await peer.stop()

        asyncio.run(asyncio.wait_for(work(), 60))


def test_the_daemon_alone_is_in_a_session_of_its_own() -> None:
    """A Ctrl-C is not for it. What else this process starts at that time stays in the terminal's session."""

    async def session_of_another() -> int:
        other = await asyncio.subprocess.create_subprocess_exec("cat", stdin=subprocess.PIPE)
        session = os.getsid(other.pid)
        await other.communicate(b"")
        return session

    async def run() -> None:
        starting = asyncio.create_task(Peer.start(PeerOptions(host="127.0.0.1")))
        while not starting.done():
            assert await session_of_another() == os.getsid(0)
        peer = await starting
        daemon = peer.p2p._child.pid
        assert os.getsid(daemon) == daemon
        await peer.stop()

    asyncio.run(run())


def test_an_answer_to_who_has_just_given_up_does_not_end_all_calls() -> None:
    """hivemind's reader would set the result of a cancelled future, and end."""

    async def work(first: Peer, second: Peer) -> None:
        control = first.p2p._client.control
        call_id, given_up = uuid.uuid4(), asyncio.get_running_loop().create_future()
        control._pending_calls[call_id] = given_up
        given_up.cancel()
        answer = p2pd_pb2.PersistentConnectionResponse(  # type: ignore[no-untyped-call]
            callId=call_id.bytes, callUnaryResponse=p2pd_pb2.CallUnaryResponse(response=b"late")
        )
        reader = asyncio.StreamReader()
        data = answer.SerializeToString()
        reader.feed_data(bytes([len(data)]) + data)
        reader.feed_eof()
        await control._read_from_persistent_conn(reader)  # to its end, and not with an error
        assert await ping(first, second.peer_id, 5.0) is not None

    run(work)


def test_calls_that_are_given_up_leave_nothing() -> None:
    async def work(first: Peer, second: Peer) -> None:
        begun = asyncio.Event()

        async def never(request: PingRequest, context: P2PContext) -> PingRequest:
            begun.set()
            await asyncio.sleep(3600)
            return request

        await second.p2p.add_protobuf_handler("never", never, PingRequest)
        call = asyncio.ensure_future(
            first.p2p.call_protobuf_handler(second.peer_id, "never", PingRequest(), PingRequest)
        )
        await begun.wait()
        assert second.p2p._client.control._handler_tasks
        call.cancel()
        while second.p2p._client.control._handler_tasks:
            await asyncio.sleep(0.01)

    run(work)


def test_a_daemon_that_is_not_heard_any_more_is_started_again() -> None:
    async def work(first: Peer, second: Peer) -> None:
        second.p2p._client.control._read_task.cancel()
        while not second.restarts:
            await asyncio.sleep(0.05)
        await second.check_daemon()
        while await ping(second, first.peer_id, 5.0) is None:
            await asyncio.sleep(0.05)

    run(work)
