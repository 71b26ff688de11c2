"""What a decode step costs beyond the arithmetic of its layers, for each hop.

    python scripts/bench_overhead.py

Two nodes with one block each of a Llama with hidden 2048 in bfloat16 (and a narrow MLP, since long layers hide what is
measured here), and one session of one row. From the time of a step, as a caller of ``session.step`` sees it, are taken:
the time of the same blocks run alone in this process, and the network, that is three legs between peers, measured with
an echo of a message of the same size. What is left is ours: codec, checks, threads, queues, packing.

Blocks and echo are measured twice: back to back, and as they come in a step, where each block waits for the other,
whose weights take its place in the processor's caches, and daemons fall asleep. The latter counts. What the nodes tell
of their turns (``compute_s``) shows how much of ours is in the engines, and how much outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.compute.openmp import set_waiting

set_waiting()

import torch
from bench import make_model, run_nodes
from hivemind.proto import runtime_pb2

from swarm.errors import PeerLostError
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.network.peer import Peer, PeerOptions
from swarm.node.engine import executor
from swarm.node.engine.attention.batch import pack
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.cache.kv_cache import KVCache, Row
from swarm.wire.codec import encode
from swarm.wire.stream import MessageStream

PROTOCOL = "bench.echo"
LIMIT = 2**20


def step_ms(session: Any, hidden: torch.Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step of a session, and of the engines' turns in it."""
    taken, turns = [], []
    for _ in range(20):
        session.step(hidden)
    ((_, route),) = session.cache._session._divided._parts  # a batch of one row is not divided
    route.on_route = lambda event: None  # so that it keeps what the nodes tell
    for _ in range(steps):
        begin = time.perf_counter()
        session.step(hidden)
        taken.append((time.perf_counter() - begin) * 1e3)
        turns.append(sum(hop.compute_s for hop in route.times) * 1e3)
    return taken, turns


def arithmetic_ms(path: Path, hidden: torch.Tensor, steps: int, pause: float) -> list[float]:
    """Milliseconds that both blocks take for one row, run as an engine runs them, without an engine.

    One runs after the other, and before each there are ``pause`` seconds, which don't count.
    """
    blocks = 2
    span = load_span(resolve(str(path)), 0, blocks, dtype=hidden.dtype, device="cpu", finish=finish_block)
    cache = KVCache(
        start=0,
        tokens=2 * steps + 64,
        page_size=16,
        kv=span.kv,
        dtype=span.dtype,
        device=span.device,
    )
    rows = [Row()]
    taken = []
    with torch.inference_mode():
        for position in range(steps):
            rows = cache.arrange(rows, sources=None, keep=[position], grow=[1], blocks=range(blocks))
            batch = pack(cache, [(rows[0], 1)], span.device)
            taken.append(0.0)
            for block in range(blocks):
                time.sleep(pause)
                begin = time.perf_counter()
                executor.run_blocks(span, hidden, batch, first=block, last=block + 1)
                taken[-1] += (time.perf_counter() - begin) * 1e3
            rows[0].length += 1
    return taken


def echo(ready: Any) -> None:
    """A process that sends back what it gets, until it is ended."""

    async def run() -> None:
        peer = await Peer.start(PeerOptions(host="127.0.0.1"))

        async def answer(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = MessageStream(reader, writer, max_bytes=LIMIT)
            with contextlib.suppress(PeerLostError):  # that's how it ends
                while (message := await stream.receive(runtime_pb2.ExpertRequest)) is not None:
                    await stream.send(message)

        await peer.p2p.add_binary_stream_handler(PROTOCOL, answer)
        ready.send(list(peer.addresses))
        await asyncio.Event().wait()

    import uvloop

    uvloop.run(run())


def leg_ms(hidden: torch.Tensor, steps: int, pause: float) -> tuple[list[float], list[float]]:
    """Milliseconds of one way between two peers, for a message with ``hidden`` in it: back to back, and each time after
    ``pause`` seconds."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(theirs,), daemon=True)
    process.start()
    addresses = ours.recv()

    async def run() -> tuple[list[float], list[float]]:
        from hivemind.p2p import PeerID

        peer = await Peer.start(PeerOptions(initial_peers=tuple(addresses[:1]), client=True))
        target = PeerID.from_base58(addresses[0].rpartition("/")[2])
        _, reader, writer = await peer.p2p.call_binary_stream_handler(target, PROTOCOL)
        stream = MessageStream(reader, writer, max_bytes=LIMIT)
        message = runtime_pb2.ExpertRequest(uid="x", tensors=[encode(hidden)], metadata=b"x" * 200)
        taken: tuple[list[float], list[float]] = [], []
        for values, seconds in zip(taken, (0.0, pause), strict=True):
            for _ in range(steps):
                await asyncio.sleep(seconds)
                begin = time.perf_counter()
                await stream.send(message)
                await stream.receive(runtime_pb2.ExpertRequest)
                values.append((time.perf_counter() - begin) * 1e3 / 2)
        await peer.stop()
        return taken

    import uvloop

    try:
        return uvloop.run(run())
    finally:
        process.terminate()


def main(
    steps: Annotated[int, typer.Option(help="Steps of each measurement.")] = 300,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = os.cpu_count() or 1,
) -> None:
    """Measure the overhead of a hop."""
    from swarm.client import SwarmModelForCausalLM

    torch.set_num_threads(threads)
    hidden = torch.randn(1, 1, 2048, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.1
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        path = make_model("hop", Path(workdir))
        with (
            run_nodes(path, ("0:1", "1:2"), threads) as peers,
            SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers) as model,
            model.session(max_length=steps + 64) as session,
        ):
            step, turns = step_ms(session, hidden, steps)
        close = arithmetic_ms(path, hidden, steps, 0.0)
        # what a step has beside the blocks is before, between and behind them
        pause = (statistics.median(step) - statistics.median(close)) / 3e3
        blocks = arithmetic_ms(path, hidden, steps, pause)
    leg_close, leg = leg_ms(hidden, steps, statistics.median(step) / 1e3)
    print(f"load {os.getloadavg()[0]:.1f}, {threads} threads; milliseconds")
    print("| | median | fastest tenth |\n| --- | --- | --- |")
    for name, values in {
        "step": step,
        "its layers, run alone, back to back": close,
        "its layers, run alone, as they come in a step": blocks,
        "one leg of the network, back to back": leg_close,
        "one leg of the network, once a step": leg,
        "turns of both engines, as they tell": turns,
    }.items():
        print(f"| {name} | {statistics.median(values):.2f} | {_tenth(values):.2f} |")
    for name, take in (("median", statistics.median), ("fastest tenth", _tenth)):
        ours, engines = (take(step) - take(blocks) - 3 * take(leg)) / 2, (take(turns) - take(blocks)) / 2
        cold = (take(step) - take(close) - 3 * take(leg_close)) / 2
        print(
            f"overhead of a hop, {name}: {ours:.2f} ms (target: under 1), of it {engines:.2f} in the engine; "
            f"{cold:.2f} beyond layers and network back to back"
        )


def _tenth(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[0]


if __name__ == "__main__":
    typer.run(main)
