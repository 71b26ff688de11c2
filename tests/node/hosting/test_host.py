"""A host on loopback: what it says and what the swarm hears, from joining over growing and moving to leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import ConnectError, RemoteError
from swarm.model.source import resolve, resolve_store
from swarm.model.tensors import block_tensors
from swarm.network import dht
from swarm.network.peer import Peer
from swarm.node.hosting.host import Host
from swarm.node.hosting.invitation import reachable
from swarm.node.hosting.weights.sharing import Sharing
from swarm.node.settings import NodeSettings
from swarm.weights.sharing.manifest import make_manifest
from swarm.weights.sharing.store import WeightStore
from swarm.wire import rpc
from swarm.wire.codec import encode
from swarm.wire.records import ServerInfo, ServerState, span_uid
from swarm.wire.rpc import Request, Response
from swarm.wire.stream import MessageStream
from tests.models import tiny_model
from tests.node.hosting.swarm_of_two import JOINING, Recorder, make_means, states, two_peers, until
from tests.swarm_e2e.nodes import figures, free_port


def run(work: Callable[[Peer, Peer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with two_peers() as (node, other):
            await asyncio.wait_for(work(node, other), 120)

    asyncio.run(main())


def test_it_joins_serves_and_leaves() -> None:
    async def work(node: Peer, other: Peer) -> None:
        path, output, port = tiny_model("llama-gqa", layers=3), Recorder(), free_port()
        means = make_means(path, node, output, count=2, blocks="1:3", metrics_port=port)
        prefix, host = means.source.dht_prefix, Host(means, JOINING)
        taking = asyncio.create_task(host.take(1, 3, [0.0] * 3))
        while await states(other, node, prefix, 3) != "-JJ":
            await asyncio.sleep(0.01)
        await taking
        assert [name for name, _ in output.events] == ["stage", "stage", "ready"]
        assert [fields["stage"] for fields in output.named("stage")] == ["load", "warm-up"]
        (ready,) = output.named("ready")
        assert (ready["blocks"], ready["peer_id"]) == ([1, 3], node.peer_id.to_base58())
        assert f"--initial-peers {reachable(node)}" in ready["lines"][1]
        assert await states(other, node, prefix, 3) == "-OO"
        info = (await dht.fetch(other.dht, prefix, 3))[1][node.peer_id]
        assert info.offer is not None
        assert info.offer.started
        assert info.throughput == info.inference_rps
        assert info.throughput
        assert info.cache_tokens_left == 256
        running = asyncio.create_task(host.run())  # nothing more to do: it was told its blocks
        metrics = await asyncio.to_thread(figures, f"http://127.0.0.1:{port}/metrics")
        assert metrics["swarm_cache_tokens_total"] == 256
        assert (metrics["swarm_daemon_up"], metrics["swarm_daemon_restarts_total"]) == (1, 0)
        running.cancel()
        await asyncio.wait({running})
        await host.leave()
        await host.close()
        assert await states(other, node, prefix, 3) == "---"

    run(work)


def test_a_port_for_metrics_that_is_taken_is_no_node() -> None:
    async def work(node: Peer, other: Peer) -> None:
        port = int(node.addresses[0].split("/tcp/")[1].split("/")[0])
        means = make_means(tiny_model("llama-gqa", layers=2), node, Recorder(), count=2, metrics_port=port)
        host = Host(means, JOINING)
        with pytest.raises(ConnectError, match="choose another --metrics-port"):
            await host.take(0, 2, [0.0] * 2)
        assert await states(other, node, means.source.dht_prefix, 2) == "JJ"
        await host.close()
        assert await states(other, node, means.source.dht_prefix, 2) == "--"

    run(work)


def test_it_ends_when_its_engine_breaks_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(node: Peer, other: Peer) -> None:
        means = make_means(tiny_model("llama-gqa", layers=2), node, Recorder(), count=2)
        host = Host(means, JOINING)
        await host.take(0, 2, [0.0] * 2)
        running = asyncio.create_task(host.run())
        _, reader, writer = await other.p2p.call_binary_stream_handler(node.peer_id, rpc.handle_name(rpc.INFERENCE))
        stream = MessageStream(reader, writer, max_bytes=2**20)
        tensors, prefix = (torch.zeros(1, 3, 64), rpc.EMPTY, rpc.EMPTY_INT64), means.source.dht_prefix
        about = rpc.dump({"max_length": 8})
        step = Request(uid=span_uid(prefix, 0, 2), tensors=[*map(encode, tensors)], metadata=about)
        await stream.send(step)
        assert await stream.receive(Response) is not None
        assert host._serving is not None
        assert host._serving.engine is not None
        monkeypatch.setattr(host._serving.engine, "_patience_s", lambda: 1 / 0)
        await stream.send(step)
        with pytest.raises(RemoteError, match="the node's engine broke"):
            await stream.receive(Response)
        with pytest.raises(RemoteError, match="the node's engine broke"):
            await running
        await host.leave()
        await host.close()
        assert await states(other, node, prefix, 2) == "--"

    run(work)


def test_it_announces_itself_at_once_when_its_daemon_was_started_again() -> None:
    async def work(other: Peer, node: Peer) -> None:  # a node that was told an initial peer
        means = make_means(tiny_model("llama-gqa", layers=2), node, Recorder(), count=2, update_period=3600)
        prefix, host = means.source.dht_prefix, Host(means, JOINING)
        await host.take(0, 2, [0.0] * 2)
        running = asyncio.create_task(host.run())

        async def started() -> float:
            info = (await dht.fetch(other.dht, prefix, 2))[0][node.peer_id]
            return info.offer.started if info.offer is not None else 0.0

        before = await started()
        node.p2p._child.kill()
        while await started() == before:
            await asyncio.sleep(0.05)
        assert node.restarts == 1
        running.cancel()
        await asyncio.wait({running})
        await host.leave()
        await host.close()

    run(work)


def test_it_moves_to_blocks_that_nobody_serves_any_more() -> None:
    async def work(node: Peer, other: Peer) -> None:
        path, output = tiny_model("llama-gqa", layers=4), Recorder()
        means = make_means(path, node, output, count=2, balance_period=0.05, update_period=0.05)
        prefix, host = means.source.dht_prefix, Host(means, JOINING)
        there = ServerInfo(ServerState.ONLINE, 1e5, start_block=0, end_block=4)
        await dht.announce(other.dht, prefix, 0, 4, there, ttl=60)
        await host.take(0, 2, [0.0] * 4)
        running = asyncio.create_task(host.run())
        gone = ServerInfo(ServerState.OFFLINE, 1e5, start_block=0, end_block=4)
        await dht.announce(other.dht, prefix, 2, 4, gone, ttl=60)
        await until(lambda: len(output.named("ready")) == 2 or running.done())
        assert [fields["blocks"] for fields in output.named("moving")] == [[2, 4]]
        assert [fields["blocks"] for fields in output.named("ready")] == [[0, 2], [2, 4]]
        assert await states(other, node, prefix, 4) == "--OO"
        running.cancel()
        await asyncio.wait({running})
        await host.leave()
        await host.close()
        assert await states(other, node, prefix, 4) == "----"

    run(work)


def test_it_serves_what_is_here_while_the_rest_is_missing(tmp_path: Path) -> None:
    """It has nothing itself; the other peer has one block at first, then another one, then all."""
    path = tiny_model("llama-gqa", sharded=True, hidden=192)
    whole = WeightStore(path, make_manifest(path))
    blocks = [whole.pieces_of(names) for names in block_tensors(resolve(str(path)))]

    async def work(node: Peer, other: Peer) -> None:
        output, store = Recorder(), WeightStore.create(tmp_path / "store", whole.manifest)
        whole.has &= ~(blocks[1] | blocks[3]) | blocks[2]
        settings: dict[str, Any] = {"blocks": "1:4", "weights": "peers", "cache_dir": tmp_path / "cache"}
        async with AsyncExitStack() as stack:
            await Sharing(other, "m", whole, NodeSettings("m"), Recorder()).begin(stack)
            sharing = Sharing(node, "m", store, NodeSettings("m", **settings), output)
            await sharing.fetch_small()
            source = resolve_store("m", store, "m")
            await sharing.know(source)
            means = make_means(path, node, output, count=3, source=source, sharing=sharing, **settings)
            host = Host(means, JOINING)
            await host.take(1, 4, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
            assert await states(other, node, "m", 6) == "-JOJ--"
            running = asyncio.create_task(host.run())
            whole.has |= blocks[3]
            await until(lambda: len(output.named("serving")) == 2 or running.done())
            assert await states(other, node, "m", 6) == "-JOO--"
            whole.has |= blocks[1]
            await until(lambda: bool(output.named("ready")) or running.done())
            running.cancel()
            await asyncio.wait({running})
            served = [(fields["blocks"], fields.get("span")) for fields in output.named("serving")]
            assert served == [([2, 3], [1, 4]), ([2, 4], [1, 4])]
            assert [fields["blocks"] for fields in output.named("ready")] == [[1, 4]]
            assert await states(other, node, "m", 6) == "-OOO--"
            await host.leave()
            await host.close()

    run(work)
