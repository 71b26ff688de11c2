"""Nodes and clients that have no checkpoint of their own: they serve, and generate, with weights from peers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client import SwarmModelForCausalLM
from swarm.errors import ModelError, UsageError
from swarm.model.source import resolve
from swarm.model.tensors import block_tensors, end_tensors
from swarm.network import dht
from swarm.network.peer import Peer, PeerOptions
from swarm.weights.sharing.holders import Holder, announce_holder, fetch_holders
from swarm.weights.sharing.manifest import make_manifest
from swarm.weights.sharing.seeder import Seeder
from swarm.weights.sharing.store import WeightStore
from swarm.wire.records import ServerInfo, ServerState
from tests.swarm_e2e.nodes import Node, run_command
from tests.swarm_e2e.processes import HERE, NAME, Processes, last, wait_until

MORE = {"max_new_tokens": 18}


def test_nodes_without_a_checkpoint_generate_what_transformers_does(processes: Processes, files: Path) -> None:
    seeder = processes.seed(files)
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
    expected = AutoModelForCausalLM.from_pretrained(files).generate(ids, **options)
    where: dict[str, Any] = {"initial_peers": processes.peers, "dht_prefix": NAME}
    with SwarmModelForCausalLM.from_pretrained(str(files), **where) as ours:
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
async def seeding(files: Path) -> AsyncIterator[tuple[Peer, WeightStore]]:
    """A seeder in this process, which hands out what its store says that it has."""
    peer = await Peer.start(PeerOptions(host="127.0.0.1"))
    try:
        store = WeightStore(files, make_manifest(files))
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


def test_a_block_is_served_before_the_others_are_here(processes: Processes, files: Path) -> None:
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def watch(go_on: Callable[[], None]) -> None:
        others = [processes.start("serve", str(files), "--blocks", one, "--dht-prefix", NAME) for one in ("1:6", "4:6")]
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
        with (
            SwarmModelForCausalLM.from_pretrained(str(files), **where) as ours,
            ours.session(max_length=32) as session,
        ):
            text = ours.generate(ids, session=session, **options)
            assert [str(hop.peer_id) for hop in ours.last_route if hop.start == 0] == [begun["peer_id"]]
            assert node.ready is None
            go_on()
            assert node.wait_ready()["blocks"] == [0, 4]
            assert served(processes.peers) == [([0, 4], "online"), *rest]
            text = ours.generate(text, session=session, **options)  # over the one block, as before
            others[0].kill()
            text = ours.generate(text, session=session, **options)  # and now over all four
        assert torch.equal(text, AutoModelForCausalLM.from_pretrained(files).generate(ids, **options | MORE))

    async def run() -> None:
        async with seeding(files) as (peer, store):
            blocks = [store.pieces_of(names) for names in block_tensors(resolve(str(files)))]
            missing = (blocks[1] | blocks[2] | blocks[3]) & ~blocks[0]
            store.has &= ~missing
            processes.peers = list(peer.addresses[:1])
            await asyncio.to_thread(watch, lambda: store.has.__ior__(missing))

    asyncio.run(run())


def test_nodes_move_to_blocks_that_nobody_serves_any_more(processes: Processes, files: Path) -> None:
    """One of two that serve the same moves, with the weights that it then needs; and back, in the middle of a text."""
    serve = ("serve", NAME, "--weights", "peers", "--num-blocks", "3", "--mean-balance-check-period", "0.7")
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def said(nodes: list[Node], name: str) -> list[list[int]]:
        return sorted(event["blocks"] for node in nodes for event in node.events() if event["event"] == name)

    def generate(nodes: list[Node]) -> None:
        processes.start("serve", str(files), "--blocks", "3:6", "--dht-prefix", NAME).wait_ready()
        where: dict[str, Any] = {"initial_peers": processes.peers, "dht_prefix": NAME, "update_period": 0.2}
        with (
            SwarmModelForCausalLM.from_pretrained(str(files), **where) as ours,
            ours.session(max_length=32) as session,
        ):
            text = ours.generate(ids, session=session, **options)
            first = next(node for node in nodes if node.peer_id == str(ours.last_route[0].peer_id))
            first.terminate()  # and the other one, which isn't needed where it is, takes its place
            text = ours.generate(text, session=session, **options)
            assert {str(hop.peer_id) for hop in ours.last_route} >= {node.peer_id for node in nodes if node != first}
        both = {**options, "max_new_tokens": 12}
        assert torch.equal(text, AutoModelForCausalLM.from_pretrained(files).generate(ids, **both))

    async def run() -> None:
        async with seeding(files) as (peer, _):
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
