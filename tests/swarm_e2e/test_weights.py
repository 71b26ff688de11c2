"""Weights from peers, with real processes: what arrives, from whom, and what doesn't."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client import SwarmModelForCausalLM
from swarm.errors import BadRequestError, ModelError, RemoteError, UsageError
from swarm.model.source import resolve
from swarm.model.tensors import block_tensors, end_tensors
from swarm.network import dht
from swarm.network.peer import Peer, PeerOptions
from swarm.weights.sharing.holders import Holder, announce_holder, fetch_holders, fetch_manifest
from swarm.weights.sharing.manifest import make_manifest
from swarm.weights.sharing.protocol import MAX_REPLY_BYTES, PIECES, PiecesRequest, load_have
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore
from swarm.wire.records import ServerInfo, ServerState
from swarm.wire.rpc import Response
from swarm.wire.stream import MessageStream
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Node, run_command, run_to_end

HERE = ("--host", "127.0.0.1", "--log-format", "json")
NAME = "weights-hf"
MORE = {"max_new_tokens": 18}
FAST = "6"  # MB/s, slow enough that something can happen in between


class Processes:
    """Commands of ``swarm-node``, each with a cache of its own, as on machines of their own."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.nodes: list[Node] = []
        self.peers: list[str] = []

    def argv(self, *argv: str) -> list[str]:
        cache = self.workdir / f"cache-{len(list(self.workdir.glob('cache-*')))}"
        cache.mkdir()
        self.cache = cache
        joining = [part for peer in self.peers for part in ("--initial-peers", peer)]
        return [*argv, "--cache-dir", str(cache), *HERE, *joining]

    def start(self, *argv: str) -> Node:
        node = Node(self.argv(*argv), self.workdir)
        self.nodes.append(node)
        return node

    def seed(self, model: Path, *options: str) -> Node:
        node = self.start("seed", str(model), "--dht-prefix", NAME, *options)
        self.peers = self.peers or node.wait_ready()["maddrs"][:1]
        return node

    def run(self, *argv: str) -> tuple[int, list[dict[str, Any]], str]:
        return run_to_end(self.argv(*argv), self.workdir)

    def close(self) -> None:
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait_gone(15)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.close()


@pytest.fixture(scope="module")
def model() -> Path:
    """Of some 12 MB, in shards."""
    return tiny_model("llama-gqa", sharded=True, hidden=192)


@pytest.fixture(scope="module")
def size(model: Path) -> int:
    return sum(file.stat().st_size for file in model.iterdir())


def wait_until(condition: Callable[[], object], node: Node, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (node.stdout.read_text(), node.stderr.read_text()[-3000:])
        time.sleep(0.02)


def last(node: Node, name: str) -> dict[str, Any] | None:
    return next((event for event in reversed(node.events()) if event["event"] == name), None)


def part_done(node: Node) -> float:
    """How much of the weights is here, 0 to 1."""
    found = [e for e in node.events() if e["event"] == "progress" and "weights" in e["message"] and e["done"]]
    return found[-1]["done"] / found[-1]["total"] if found else 0.0


def wait_done(node: Node) -> dict[str, Any]:
    wait_until(lambda: not node.alive, node)
    found = last(node, "done")
    assert found is not None, (node.stdout.read_text(), node.stderr.read_text()[-3000:])
    return found


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir() if path.is_file())
    assert names == sorted(path.name for path in second.iterdir() if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_two_get_it_from_one_and_from_each_other(processes: Processes, model: Path, size: int) -> None:
    seeder = processes.seed(model, "--upload-rate", FAST)
    copies = [processes.workdir / "a", processes.workdir / "b"]
    nodes = [processes.start("fetch", NAME, "--to", str(copy)) for copy in copies]
    for node, copy in zip(nodes, copies, strict=True):
        done = wait_done(node)
        assert done["directory"] == str(copy)
        assert done["whole"]
        assert_same_files(model, copy)
        fetched = [event for event in node.events() if event["event"] == "fetched"]
        assert sum(event["bytes"] for event in fetched) == size
        assert sum(sum(event["sources"].values()) for event in fetched) == size
    seeder.terminate()
    seeder.wait_gone(15)
    sent = last(seeder, "sent")
    assert sent is not None
    assert size <= sent["bytes"] < 1.8 * size, "most pieces went from one to the other"


def test_a_seeder_dies_in_the_middle(processes: Processes, model: Path) -> None:
    seeders = [processes.seed(model, "--upload-rate", "2")]
    seeders.append(processes.seed(model, "--upload-rate", "2"))
    seeders[1].wait_ready()
    node = processes.start("fetch", NAME, "--to", str(processes.workdir / "copy"))
    wait_until(lambda: part_done(node) >= 0.3, node)
    seeders[0].kill()
    assert wait_done(node)["whole"]
    assert_same_files(model, processes.workdir / "copy")
    fetched = last(node, "fetched")
    assert fetched is not None
    assert len(fetched["sources"]) == 2


class LyingStore(WeightStore):
    """Has everything, and sends something else."""

    def read(self, piece: int) -> bytes | None:
        data = super().read(piece)
        return data and bytes([data[0] ^ 1]) + data[1:]


def test_a_liar_is_asked_no_more(processes: Processes, model: Path) -> None:
    honest = processes.seed(model, "--upload-rate", "4")

    async def lie() -> tuple[str, Node, int]:
        peer = await Peer.start(PeerOptions(initial_peers=processes.peers, host="127.0.0.1"))
        try:
            store = LyingStore(model, await asyncio.to_thread(make_manifest, model))
            seeder = Seeder(peer.p2p, store)
            await seeder.register()
            await announce_holder(peer.dht, NAME, Holder(store.manifest.root, ((0, 6),), True), ttl=60)
            node = processes.start("fetch", NAME, "--to", str(processes.workdir / "copy"))
            await asyncio.to_thread(wait_done, node)
            return peer.peer_id.to_base58(), node, seeder.sent
        finally:
            await peer.stop()

    liar, node, sent = asyncio.run(lie())
    assert_same_files(model, processes.workdir / "copy")
    assert sent, "the liar has been asked"
    fetched = [event for event in node.events() if event["event"] == "fetched"]
    assert {source for event in fetched for source in event["sources"]} == {honest.peer_id}
    warned = [event for event in node.events() if event["event"] == "log" and "asked no more" in event["message"]]
    assert len(warned) == 1
    assert liar in warned[0]["message"]


def test_a_seeder_answers_what_it_should_and_nothing_else(model: Path) -> None:
    async def run() -> None:
        store = WeightStore(model, make_manifest(model))
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


def test_a_restart_goes_on_with_what_is_there(processes: Processes, model: Path, size: int) -> None:
    processes.seed(model, "--upload-rate", "4")
    fetch = ("fetch", NAME, "--to", str(processes.workdir / "copy"))
    first = processes.start(*fetch)
    wait_until(lambda: part_done(first) >= 0.4, first)
    first.terminate()
    first.wait_gone(15)
    assert last(first, "stopped") is not None
    assert not (processes.workdir / "copy" / "model.safetensors").exists()
    second = processes.start(*fetch)
    assert wait_done(second)["whole"]
    assert_same_files(model, processes.workdir / "copy")
    fetched = [event for event in second.events() if event["event"] == "fetched"]
    assert sum(event["bytes"] for event in fetched) <= 0.6 * size
    third = processes.start(*fetch)
    assert wait_done(third)["whole"]
    assert last(third, "fetched") is None


def test_nodes_without_a_checkpoint_generate_what_transformers_does(processes: Processes, model: Path) -> None:
    seeder = processes.seed(model)
    root = seeder.wait_ready()["manifest"]
    first = processes.start("serve", NAME, "--weights", "peers", "--blocks", "0:4", "--manifest", root)
    second = processes.start("serve", NAME, "--weights", "auto", "--blocks", "3:6")
    for node in (first, second):
        node.wait_ready()
    seeder.terminate()
    seeder.wait_gone(15)
    processes.peers = first.wait_ready()["maddrs"][:1]
    third = processes.start("serve", NAME, "--weights", "peers", "--blocks", "0:6")
    third.wait_ready()  # from nodes that serve blocks
    cache = processes.cache
    fetched = last(third, "fetched")
    assert fetched is not None
    assert set(fetched["sources"]) == {first.peer_id, second.peer_id}

    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(model).generate(ids, **options)
    where: dict[str, Any] = {"initial_peers": processes.peers, "dht_prefix": NAME}
    with SwarmModelForCausalLM.from_pretrained(str(model), **where) as ours:
        assert torch.equal(ours.generate(ids, **options), expected)
        for node in (first, second):
            node.terminate()
            node.wait_gone(15)
        assert torch.equal(ours.generate(ids, **options), expected)

    third.terminate()
    third.wait_gone(15)
    alone = ["serve", NAME, "--weights", "peers", "--blocks", "0:6", "--cache-dir", str(cache), *HERE]
    processes.nodes.append(Node(alone, processes.workdir))
    processes.nodes[-1].wait_ready()  # nobody is up any more, but all is here


@contextlib.asynccontextmanager
async def seeding(model: Path) -> AsyncIterator[tuple[Peer, WeightStore]]:
    """A seeder in this process, which hands out what its store says that it has."""
    peer = await Peer.start(PeerOptions(host="127.0.0.1"))
    try:
        store = WeightStore(model, make_manifest(model))
        await Seeder(peer.p2p, store).register()
        await announce_holder(peer.dht, NAME, Holder(store.manifest.root), ttl=60)
        yield peer, store
    finally:
        await peer.stop()


def served(peers: list[str]) -> list[tuple[list[int], str]]:
    """What a machine that hasn't even the config sees."""
    found = run_command(["swarm-node", "status", NAME, "--json", "--initial-peers", peers[0]])
    assert found.returncode == 0, found.stderr
    return sorted((each["blocks"], each["state"]) for each in json.loads(found.stdout)["nodes"])


def test_a_block_is_served_before_the_others_are_here(processes: Processes, model: Path) -> None:
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def watch(go_on: Callable[[], None]) -> None:
        others = [processes.start("serve", str(model), "--blocks", one, "--dht-prefix", NAME) for one in ("1:6", "4:6")]
        for other in others:
            other.wait_ready()
        node = processes.start("serve", NAME, "--weights", "peers", "--blocks", "0:4")
        wait_until(lambda: last(node, "serving"), node)
        begun = last(node, "serving")
        assert begun is not None
        assert (begun["blocks"], begun["span"]) == ([0, 1], [0, 4])
        rest = [([1, 6], "online"), ([4, 6], "online")]
        assert served(processes.peers) == [([0, 1], "online"), *rest]
        where: dict[str, Any] = {"initial_peers": processes.peers, "dht_prefix": NAME, "update_period": 0.2}
        with SwarmModelForCausalLM.from_pretrained(str(model), **where) as ours, ours.session(max_length=32) as session:
            text = ours.generate(ids, session=session, **options)
            assert [str(hop.peer_id) for hop in ours.last_route if hop.start == 0] == [begun["peer_id"]]
            assert node.ready is None
            go_on()
            assert node.wait_ready()["blocks"] == [0, 4]
            assert served(processes.peers) == [([0, 4], "online"), *rest]
            text = ours.generate(text, session=session, **options)  # over the one block, as before
            others[0].kill()
            text = ours.generate(text, session=session, **options)  # and now over all four
        assert torch.equal(text, AutoModelForCausalLM.from_pretrained(model).generate(ids, **options | MORE))

    async def run() -> None:
        async with seeding(model) as (peer, store):
            blocks = [store.pieces_of(names) for names in block_tensors(resolve(str(model)))]
            missing = (blocks[1] | blocks[2] | blocks[3]) & ~blocks[0]
            store.has &= ~missing
            processes.peers = list(peer.addresses[:1])
            await asyncio.to_thread(watch, lambda: store.has.__ior__(missing))

    asyncio.run(run())


def test_nodes_move_to_blocks_that_nobody_serves_any_more(processes: Processes, model: Path) -> None:
    """One of two that serve the same moves, with the weights that it then needs; and back, in the middle of a text."""
    serve = ("serve", NAME, "--weights", "peers", "--num-blocks", "3", "--mean-balance-check-period", "0.7")
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def said(nodes: list[Node], name: str) -> list[list[int]]:
        return sorted(event["blocks"] for node in nodes for event in node.events() if event["event"] == name)

    def generate(nodes: list[Node]) -> None:
        processes.start("serve", str(model), "--blocks", "3:6", "--dht-prefix", NAME).wait_ready()
        where: dict[str, Any] = {"initial_peers": processes.peers, "dht_prefix": NAME, "update_period": 0.2}
        with SwarmModelForCausalLM.from_pretrained(str(model), **where) as ours, ours.session(max_length=32) as session:
            text = ours.generate(ids, session=session, **options)
            first = next(node for node in nodes if node.peer_id == str(ours.last_route[0].peer_id))
            first.terminate()  # and the other one, which isn't needed where it is, takes its place
            text = ours.generate(text, session=session, **options)
            assert {str(hop.peer_id) for hop in ours.last_route} >= {node.peer_id for node in nodes if node != first}
        both = {**options, "max_new_tokens": 12}
        assert torch.equal(text, AutoModelForCausalLM.from_pretrained(model).generate(ids, **both))

    async def run() -> None:
        async with seeding(model) as (peer, _):
            processes.peers = list(peer.addresses[:1])
            there = ServerInfo(ServerState.ONLINE, 1e9, start_block=3, end_block=6)
            await dht.announce(peer.dht, NAME, 3, 6, there, ttl=60)
            nodes = [processes.start(*serve) for _ in range(2)]
            for node in nodes:
                assert (await asyncio.to_thread(node.wait_ready))["blocks"] == [0, 3]
            gone = dataclasses.replace(there, state=ServerState.OFFLINE)
            await dht.announce(peer.dht, NAME, 3, 6, gone, ttl=60)
            everything = [[0, 3], [0, 3], [3, 6]]
            await asyncio.to_thread(wait_until, lambda: said(nodes, "ready") == everything, nodes[0])
            assert said(nodes, "moving") == [[3, 6]]
            assert await asyncio.to_thread(served, processes.peers) == [([0, 3], "online"), ([3, 6], "online")]
            await asyncio.to_thread(generate, nodes)

    asyncio.run(run())


def test_a_client_needs_no_checkpoint_either(processes: Processes, tmp_path: Path) -> None:
    """Nothing but the name, or the manifest's root, and the swarm."""
    seeder = processes.start("seed", "demo", "--dht-prefix", NAME)
    root = seeder.wait_ready()["manifest"]
    processes.peers = seeder.wait_ready()["maddrs"][:1]
    node = processes.start("serve", NAME, "--weights", "peers")
    node.wait_ready()
    source = resolve("demo")
    tokenizer, whole = AutoTokenizer.from_pretrained(source.path), AutoModelForCausalLM.from_pretrained(source.path)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = whole.generate(ids, max_new_tokens=12, do_sample=False)

    generate = ["swarm", "generate", NAME, "--weights", "peers", "--manifest", root, "--cache-dir", str(tmp_path / "c")]
    options = ["-p", "Once upon a time", "--max-new-tokens", "12", "--json", "--initial-peers", processes.peers[0]]
    found = run_command([*generate, *options])
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert "from peers: 100%" in found.stderr

    where: dict[str, Any] = {"initial_peers": processes.peers, "weights": "peers", "cache_dir": tmp_path / "d"}
    with SwarmModelForCausalLM.from_pretrained(root, **where) as model:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        assert AutoTokenizer.from_pretrained(model.files)("Once upon a time").input_ids == ids[0].tolist()
        store = WeightStore.open(model.files)
    assert store is not None
    assert (store.has == (store.small_pieces() | store.pieces_of(end_tensors(source)))).all()
    assert not store.is_whole

    async def holders() -> set[str]:
        peer = await Peer.start(PeerOptions(initial_peers=processes.peers, client=True))
        try:
            return {peer_id.to_base58() for peer_id in await fetch_holders(peer.dht, NAME)}
        finally:
            await peer.stop()

    assert asyncio.run(holders()) == {seeder.peer_id, node.peer_id}, "clients hand nothing out"
    seeder.terminate()
    seeder.wait_gone(15)
    where["initial_peers"] = node.wait_ready()["maddrs"][:1]
    with SwarmModelForCausalLM.from_pretrained(NAME, manifest=root, **where) as model:  # all is here
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    for wrong, message in (
        ({"manifest": "00" * 32}, "nobody in this swarm has weights"),
        ({"manifest": "x"}, "64 hex digits"),
        ({"weights": "torrent"}, "hub, peers, auto"),
        ({"weights": "hub", "manifest": root}, "for weights from peers"),
    ):
        with pytest.raises(UsageError, match=message):
            SwarmModelForCausalLM.from_pretrained(NAME, **where | wrong)
    with pytest.raises(ModelError, match="no node in this swarm hands out weights of 'x'"):
        SwarmModelForCausalLM.from_pretrained("x", **where)


def test_other_weights_are_refused(processes: Processes, model: Path, tmp_path: Path) -> None:
    seeder = processes.seed(model)
    root = seeder.wait_ready()["manifest"]
    other = Path(shutil.copytree(tiny_model("llama-gqa", hidden=192), tmp_path / "other"))  # as one file
    serving = processes.start("serve", str(model), "--weights", "auto", "--blocks", "0:3", "--dht-prefix", NAME)
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
