"""Weights from peers, with real processes: what arrives, from whom, and what doesn't."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from swarm.errors import BadRequestError, RemoteError
from swarm.network.peer import Peer, PeerOptions
from swarm.weights.sharing.holders import Holder, announce_holder, fetch_manifest
from swarm.weights.sharing.manifest import make_manifest
from swarm.weights.sharing.protocol import MAX_REPLY_BYTES, PIECES, PiecesRequest, load_have
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore
from swarm.wire.rpc import Response
from swarm.wire.stream import MessageStream
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Node
from tests.swarm_e2e.processes import NAME, Processes, assert_same_files, last, part_done, wait_done, wait_until

FAST = "6"  # MB/s, slow enough that something can happen in between


@pytest.fixture(scope="module")
def size(files: Path) -> int:
    return sum(file.stat().st_size for file in files.iterdir())


def test_two_get_it_from_one_and_from_each_other(processes: Processes, files: Path, size: int) -> None:
    seeder = processes.seed(files, "--upload-rate", FAST)
    copies = [processes.workdir / "a", processes.workdir / "b"]
    nodes = [processes.start("fetch", NAME, "--to", str(copy)) for copy in copies]
    for node, copy in zip(nodes, copies, strict=True):
        done = wait_done(node)
        assert done["directory"] == str(copy)
        assert done["whole"]
        assert_same_files(files, copy)
        fetched = [event for event in node.events() if event["event"] == "fetched"]
        assert sum(event["bytes"] for event in fetched) == size
        assert sum(sum(event["sources"].values()) for event in fetched) == size
    seeder.terminate()
    seeder.wait_gone(15)
    sent = last(seeder, "sent")
    assert sent is not None
    assert size <= sent["bytes"] < 1.8 * size, "most pieces went from one to the other"


def test_a_seeder_dies_in_the_middle(processes: Processes, files: Path) -> None:
    seeders = [processes.seed(files, "--upload-rate", "2")]
    seeders.append(processes.seed(files, "--upload-rate", "2"))
    seeders[1].wait_ready()
    node = processes.start("fetch", NAME, "--to", str(processes.workdir / "copy"))
    wait_until(lambda: part_done(node) >= 0.3, node)
    seeders[0].kill()
    assert wait_done(node)["whole"]
    assert_same_files(files, processes.workdir / "copy")
    fetched = last(node, "fetched")
    assert fetched is not None
    assert len(fetched["sources"]) == 2


class LyingStore(WeightStore):
    """Has everything, and sends something else."""

    def read(self, piece: int) -> bytes | None:
        data = super().read(piece)
        return data and bytes([data[0] ^ 1]) + data[1:]


def test_a_liar_is_asked_no_more(processes: Processes, files: Path) -> None:
    honest = processes.seed(files, "--upload-rate", "4")

    async def lie() -> tuple[str, Node, int]:
        peer = await Peer.start(PeerOptions(initial_peers=processes.peers, host="127.0.0.1"))
        try:
            store = LyingStore(files, await asyncio.to_thread(make_manifest, files))
            seeder = Seeder(peer.p2p, store)
            await seeder.register()
            await announce_holder(peer.dht, NAME, Holder(store.manifest.root, ((0, 6),), True), ttl=60)
            node = processes.start("fetch", NAME, "--to", str(processes.workdir / "copy"))
            await asyncio.to_thread(wait_done, node)
            return peer.peer_id.to_base58(), node, seeder.sent
        finally:
            await peer.stop()

    liar, node, sent = asyncio.run(lie())
    assert_same_files(files, processes.workdir / "copy")
    assert sent, "the liar has been asked"
    fetched = [event for event in node.events() if event["event"] == "fetched"]
    assert {source for event in fetched for source in event["sources"]} == {honest.peer_id}
    warned = [event for event in node.events() if event["event"] == "log" and "asked no more" in event["message"]]
    assert len(warned) == 1
    assert liar in warned[0]["message"]


def test_a_seeder_answers_what_it_should_and_nothing_else(files: Path) -> None:
    async def run() -> None:
        store = WeightStore(files, make_manifest(files))
        ours = await Peer.start(PeerOptions(host="127.0.0.1"))
        theirs = await Peer.start(PeerOptions(host="127.0.0.1", initial_peers=ours.addresses))
        try:
            await Seeder(ours.p2p, store).register()
            assert await fetch_manifest(theirs, store.manifest.root, [ours.peer_id]) == store.manifest

            async def ask(*requests: PiecesRequest) -> tuple[MessageStream, list[bytes]]:
                _, reader, writer = await theirs.p2p.call_binary_stream_handler(ours.peer_id, PIECES)
                stream, found = MessageStream(reader, writer, max_bytes=MAX_REPLY_BYTES), []
                try:
                    for request in requests:
                        await stream.send(request.to_message())
                        for _ in request.pieces or [0]:
                            reply = await stream.receive(Response)
                            assert reply is not None
                            found.append(reply.metadata)
                except BaseException:
                    stream.close()
                    raise
                return stream, found

            root, last_file = store.manifest.root, len(store.manifest.files) - 1
            first, found = await ask(PiecesRequest(root, last_file, (0, 1, 2**31 - 1)), PiecesRequest(root))
            assert found[0] == store.read(int(store.first[last_file]))
            assert found[1:3] == [b"", b""]
            assert load_have(found[3], store.num_pieces)[0].all()
            with pytest.raises(RemoteError, match="other weights"):
                await ask(PiecesRequest("00" * 32, 0, (0,)))
            with pytest.raises(BadRequestError, match="no such file"):
                await ask(PiecesRequest(root, last_file + 1, (0,)))
            with pytest.raises(BadRequestError, match="at most 16"):
                await ask(PiecesRequest(root, 0, tuple(range(17))))
            second, _ = await ask(PiecesRequest(root))
            with pytest.raises(RemoteError, match="ask others"):
                await ask(PiecesRequest(root))
            first.close()
            second.close()
        finally:
            await theirs.stop()
            await ours.stop()

    asyncio.run(run())


def test_a_restart_goes_on_with_what_is_there(processes: Processes, files: Path, size: int) -> None:
    processes.seed(files, "--upload-rate", "4")
    fetch = ("fetch", NAME, "--to", str(processes.workdir / "copy"))
    first = processes.start(*fetch)
    wait_until(lambda: part_done(first) >= 0.4, first)
    first.terminate()
    first.wait_gone(15)
    assert last(first, "stopped") is not None
    assert not (processes.workdir / "copy" / "model.safetensors").exists()
    second = processes.start(*fetch)
    assert wait_done(second)["whole"]
    assert_same_files(files, processes.workdir / "copy")
    fetched = [event for event in second.events() if event["event"] == "fetched"]
    assert sum(event["bytes"] for event in fetched) <= 0.6 * size
    third = processes.start(*fetch)
    assert wait_done(third)["whole"]
    assert last(third, "fetched") is None


def test_other_weights_are_refused(processes: Processes, files: Path, tmp_path: Path) -> None:
    seeder = processes.seed(files)
    root = seeder.wait_ready()["manifest"]
    other = Path(shutil.copytree(tiny_model("llama-gqa", hidden=192), tmp_path / "other"))  # as one file
    serving = processes.start("serve", str(files), "--weights", "auto", "--blocks", "0:3", "--dht-prefix", NAME)
    serving.wait_ready()

    def refused(*argv: str) -> str:
        code, events, stderr = processes.run(*argv)
        assert (code, events[-1]["event"]) == (2, "error"), stderr
        assert "Traceback" not in stderr
        return events[-1]["message"]

    assert "nobody in this swarm has weights" in refused("fetch", NAME, "--manifest", "00" * 32)
    assert root in refused("serve", NAME, "--weights", "peers", "--manifest", "00" * 32)
    assert "64 hex digits" in refused("serve", NAME, "--weights", "peers", "--manifest", "x")
    assert "hub, peers, auto" in refused("serve", NAME, "--weights", "torrent")
    message = refused("fetch", "no-such-model")
    assert "no node in this swarm hands out weights of 'no-such-model'" in message
    assert NAME in message
    with_prefix = ("--dht-prefix", NAME)
    assert "check --manifest" in refused("serve", str(other), "--manifest", root, *with_prefix)
    assert "other weights under the name" in refused("seed", str(other), *with_prefix)
    mine = make_manifest(other).root
    assert "serves other weights" in refused("serve", str(other), "--manifest", mine, *with_prefix)
    assert "other files in it" in refused("fetch", NAME, "--to", str(other))
