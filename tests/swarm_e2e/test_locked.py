"""Attacks on a locked swarm of real nodes. An honest session runs beside each, and gets its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.errors import LockedError, UsageError
from swarm.network.info import ask_info
from swarm.network.lock.client import CALL, HELLO, PROVE, STREAM, LockedClient
from swarm.network.lock.gate import LOCKED, SHUT_OUT, WELCOME, WRONG_KEY
from swarm.network.lock.handshake import new_nonce
from swarm.network.lock.invitation import Invitation, read_invitation
from swarm.network.lock.key import SwarmKey
from swarm.network.nat.dial_back import HANDLE
from swarm.network.options import KeyOptions
from swarm.network.peer import Peer, PeerOptions
from swarm.weights.sharing.protocol import MANIFEST, PIECES
from swarm.wire import rpc
from tests.swarm_e2e.nodes import Swarm, free_port, run_command, run_swarm
from tests.swarm_e2e.test_failover import IDS, generate

KEY = SwarmKey.new()
ALL_NAMES = (
    *(f"DHTProtocol.rpc_{method}" for method in ("ping", "find", "store")),
    *(rpc.handle_name(method) for method in (rpc.INFO, rpc.INFERENCE, rpc.PUSH, rpc.PUSH_STREAM)),
    *(rpc.handle_name(method) for method in (rpc.FORWARD, rpc.FORWARD_STREAM, rpc.BACKWARD, rpc.BACKWARD_STREAM)),
    *(HANDLE, MANIFEST, PIECES),
)
Attack = Callable[[PeerID], Awaitable[None]]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "swarm.key"
    file.write_text(KEY.text())
    return file


@pytest.fixture(scope="module")
def swarm(path: Path, key_file: Path) -> Iterator[Swarm]:
    shut_out = key_file.with_name("shut-out")
    shut_out.write_text("")
    options = ("--swarm-key", str(key_file), "--shut-out", str(shut_out), "--seed")
    with run_swarm(path, ("0:3", "3:6"), *options, metrics=True) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: Swarm, key_file: Path) -> Iterator[Any]:
    given = {"initial_peers": swarm.initial_peers, "swarm_key": key_file}
    with SwarmModelForCausalLM.from_pretrained(swarm.model, **given) as model:
        yield model


@pytest.fixture
def honest(model: Any, whole: PreTrainedModel) -> Iterator[None]:
    """A session that goes on all the time; its texts are right."""
    expected, made, stop = generate(whole, IDS), list[torch.Tensor](), threading.Event()

    def work() -> None:
        while not made or not stop.is_set():
            made.append(model.generate(IDS, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=24))

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert made
    assert all(torch.equal(text, expected) for text in made)


def refused(swarm: Swarm, why: str) -> float:
    return swarm.nodes[0].figures[f'swarm_refused_total{{why="{why}"}}']


def play(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 90))


@contextlib.asynccontextmanager
async def stranger(swarm: Swarm, **options: Any) -> Any:
    """A bare daemon, which has joined on the level of connections."""
    given = {"initial_peers": swarm.initial_peers, "check_if_identity_free": False, **options}
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], **given)
    try:
        yield p2p
    finally:
        await p2p.shutdown()


def member(swarm: Swarm, **options: Any) -> Any:
    key = KeyOptions(swarm_key=(KEY,))
    given = {"initial_peers": tuple(swarm.initial_peers), "key": key, "host": "127.0.0.1", **options}
    return Peer.start(PeerOptions(**given))


async def call_raw(p2p: P2P, peer: PeerID, name: str, message: bytes) -> bytes:
    """Past the lock of ``p2p``, if it has one."""
    answer = await asyncio.wait_for(Client.call_unary_handler(p2p._client, peer, name, message), 10)
    return bytes(answer)


async def open_raw(p2p: P2P, peer: PeerID, opening: bytes) -> bytes:
    """All that a node answers to the opening of a stream."""
    _, reader, writer = await Client.stream_open(p2p._client, peer, (STREAM,))
    writer.write(opening)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return bytes(answer)


def first_node(swarm: Swarm) -> PeerID:
    return PeerID.from_base58(swarm.nodes[0].peer_id)


@pytest.mark.usefixtures("honest")
def test_without_the_key_nothing_is_there(swarm: Swarm) -> None:
    async def work() -> None:
        node = first_node(swarm)
        async with stranger(swarm) as p2p:
            for name in ALL_NAMES:
                with pytest.raises(Exception, match="not supported"):
                    await p2p._client.call_unary_handler(node, name, b"")
                with pytest.raises(Exception, match="not supported"):
                    await p2p._client.stream_open(node, (name,))
            assert await call_raw(p2p, node, HELLO, b"") == LOCKED
            assert (await call_raw(p2p, node, HELLO, WELCOME + new_nonce()))[:1] == WELCOME
            assert await call_raw(p2p, node, PROVE, b"\0" * 32) == WRONG_KEY
            assert await call_raw(p2p, node, CALL, b"\0" * 64) == LOCKED
            for opening in (b"\0\x40" + b"\0" * 64, b"\xff\xff" + b"\0" * 64):
                assert await open_raw(p2p, node, opening) == b"\0\x01" + LOCKED

    before = refused(swarm, "no_key"), refused(swarm, "wrong_key")
    play(work)
    assert (refused(swarm, "no_key"), refused(swarm, "wrong_key")) == (before[0] + 1, before[1] + 1)


@pytest.mark.usefixtures("honest")
def test_half_open_streams_of_strangers_end(swarm: Swarm) -> None:
    async def work() -> None:
        node = first_node(swarm)
        async with stranger(swarm) as p2p:
            opened = [await Client.stream_open(p2p._client, node, (STREAM,)) for _ in range(100)]
            ends = await asyncio.gather(*(asyncio.wait_for(reader.read(), 30) for _, reader, _ in opened))
            for _, _, writer in opened:
                writer.close()
            # some at once, as there are too many, and the others when their time is up
            assert {*ends} == {b"", b"\0\x01" + LOCKED}

    play(work)


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize("command", [["swarm", "generate"], ["swarm-node", "serve"], ["swarm-node", "status"]])
def test_commands_say_in_one_line_what_is_wrong(swarm: Swarm, tmp_path: Path, command: list[str]) -> None:
    other = tmp_path / "other.key"
    other.write_text(SwarmKey.new().text())
    argv = [*command, swarm.model, "--initial-peers", swarm.initial_peers[0]]
    argv += ["--prompt", "1"] if command[1] == "generate" else []
    argv += ["--host", "127.0.0.1"] if command[1] == "serve" else []
    before = refused(swarm, "wrong_key")
    for more, words in (
        ([], "this swarm is locked: give its key by --swarm-key"),
        (["--swarm-key", str(other)], "this is not the key of this swarm"),
        (["--swarm-key", KEY.text()], "doesn't belong on the command line"),
    ):
        done = run_command([*argv, *more])
        assert done.returncode == 2
        assert words in " ".join((done.stdout + done.stderr).split())
        assert KEY.text() not in done.stdout + done.stderr
    assert refused(swarm, "wrong_key") > before


@pytest.mark.usefixtures("honest")
def test_what_was_recorded_and_a_stolen_identity_are_of_no_use(
    swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thief is the member to libp2p, and has all that the member has ever said; the member is still let in."""
    said: list[tuple[str, bytes]] = []
    real_call, real_open = Client.call_unary_handler, Client.stream_open

    async def record_call(self: Client, peer_id: PeerID, proto: str, data: bytes) -> bytes:
        if isinstance(self, LockedClient):  # not what others in this process say
            said.append((proto, data))
        return bytes(await real_call(self, peer_id, proto, data))

    async def record_open(self: Client, *args: Any) -> Any:
        info, reader, writer = await real_open(self, *args)
        if not isinstance(self, LockedClient):
            return info, reader, writer
        write = writer.write

        def record(data: bytes) -> None:
            said.append((STREAM, data))
            write(data)

        writer.write = record
        return info, reader, writer

    async def work() -> None:
        node, identity = first_node(swarm), tmp_path / "identity"
        monkeypatch.setattr(Client, "call_unary_handler", record_call)
        monkeypatch.setattr(Client, "stream_open", record_open)
        peer = await member(swarm, identity=identity)
        _, _, writer = await peer.p2p.call_binary_stream_handler(node, rpc.handle_name(rpc.INFERENCE))
        writer.close()
        monkeypatch.undo()
        for name, message in [*said]:  # it can't even say it twice itself
            if name == CALL:
                assert await call_raw(peer.p2p, node, name, message) == LOCKED
        name = peer.peer_id
        await peer.stop()
        assert {name for name, _ in said} == {HELLO, PROVE, CALL, STREAM}
        for options in ({"identity_path": str(identity)}, {}):
            async with stranger(swarm, **options) as p2p:
                assert (p2p.peer_id == name) == bool(options)
                for proto, message in said:
                    if proto == STREAM:
                        assert await open_raw(p2p, node, message) == b"\0\x01" + LOCKED
                    elif proto != HELLO:
                        assert await call_raw(p2p, node, proto, message) in (LOCKED, WRONG_KEY)
                assert (await call_raw(p2p, node, HELLO, WELCOME + new_nonce()))[:1] == WELCOME
                proofs = next(message for proto, message in said if proto == PROVE)
                assert await call_raw(p2p, node, PROVE, proofs) == WRONG_KEY

    play(work)


@pytest.mark.usefixtures("honest")
def test_a_man_in_the_middle_forwards_in_vain(swarm: Swarm) -> None:
    """He gives the member his own address, and carries each message to a node and back."""
    carried: list[str] = []

    async def work() -> None:
        node = first_node(swarm)
        async with stranger(swarm) as p2p:

            def carry(name: str) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
                async def forward(message: bytes, caller: PeerID) -> bytes:
                    carried.append(name)
                    return await call_raw(p2p, node, name, message)

                return forward

            for name in (HELLO, PROVE, CALL):
                await p2p._client.add_unary_handler(name, carry(name))
            address = str((await p2p.get_visible_maddrs())[0])
            with pytest.raises(LockedError, match="not the key"):
                await member(swarm, initial_peers=(address,))

    before = refused(swarm, "wrong_key")
    play(work)
    assert carried[:2] == [HELLO, PROVE]
    assert CALL not in carried  # the member has said nothing but challenges and proofs
    assert refused(swarm, "wrong_key") > before


@pytest.mark.usefixtures("honest")
def test_a_member_is_shut_out(swarm: Swarm, key_file: Path) -> None:
    file = key_file.with_name("shut-out")

    async def work() -> None:
        node = first_node(swarm)
        peer = await member(swarm)
        try:
            assert isinstance(peer.p2p._client, LockedClient)
            _, reader, writer = await peer.p2p.call_binary_stream_handler(node, rpc.handle_name(rpc.INFERENCE))
            file.write_text(f"{peer.peer_id}  # for a reason\n")
            assert await asyncio.wait_for(reader.read(), 20) == b""  # his open stream ends
            writer.close()
            with pytest.raises(Exception, match="was shut out"):
                await peer.p2p.call_binary_stream_handler(node, rpc.handle_name(rpc.INFERENCE))
            with pytest.raises(Exception, match="was shut out"):
                await ask_info(peer.p2p, node, 10)
            assert await call_raw(peer.p2p, node, HELLO, b"") == SHUT_OUT
            file.write_text("")
        finally:
            await peer.stop()

    before = refused(swarm, "shut_out")
    play(work)
    assert refused(swarm, "shut_out") > before


def test_an_invitation_is_all_that_one_needs(swarm: Swarm, key_file: Path, whole: PreTrainedModel) -> None:
    argv = ["swarm-node", "invite", "--initial-peers", swarm.initial_peers[0]]
    done = run_command(argv, env={"SWARM_KEY": str(key_file)})
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    assert read_invitation(line).key == KEY
    assert run_command(argv).returncode == 2
    with SwarmModelForCausalLM.from_pretrained(swarm.model, join=line) as model:
        assert torch.equal(generate(model, IDS), generate(whole, IDS))
    status = run_command(["swarm", "status", swarm.model, "--json"], env={"SWARM_JOIN": line})
    assert status.returncode == 0, status.stderr
    fetched = run_command(
        ["swarm-node", "fetch", Path(swarm.model).name, "--to", str(key_file.with_name("fetched")), "--join", line]
    )
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr


def test_the_key_is_not_on_the_list_of_processes(swarm: Swarm) -> None:
    """Of a command that was given a line, after a moment."""
    line = Invitation(tuple(swarm.initial_peers), KEY).line()
    main = "from swarm.node.cli import main; main()"
    argv = [sys.executable, "-c", main, "status", swarm.model, "--json", "--join", line]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as command:
        while not Path(f"/proc/{command.pid}/cmdline").read_text().rstrip("\0").endswith("--json"):
            assert command.poll() is None
            time.sleep(0.01)
        seen, _ = command.communicate(timeout=150)
    assert len(json.loads(seen)["nodes"]) == 2
    for node in swarm.nodes:
        shown = node.stdout.read_text() + node.stderr.read_text() + Path(f"/proc/{node.pid}/cmdline").read_text()
        assert KEY.text() not in shown
        assert KEY.text()[-20:] not in shown


def test_nobody_is_shut_out_of_an_open_swarm(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("")

    async def work() -> None:
        with pytest.raises(UsageError, match="--shut-out needs --swarm-key"):
            await Peer.start(PeerOptions(host="127.0.0.1", port=free_port(), key=KeyOptions(shut_out=file)))

    play(work)
