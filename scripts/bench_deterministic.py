#!/usr/bin/env python3
"""What ``swarm-node serve --deterministic`` costs: one engine with it and one without, in turns, in one process.

Counts CPU time of one thread, so that other work on the machine disturbs less.

    python scripts/bench_deterministic.py

Says too in how many of a session's outputs bits change when others come and go, with and without.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from make_checkpoint import make_checkpoint, make_config

from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.deterministic import make_deterministic
from swarm.node.engine.engine import Engine

SIZES = {
    "hidden 512, 8 blocks, float32": {"hidden": 512, "layers": 8, "intermediate": 1376, "heads": 8, "kv_heads": 4},
    "hidden 2048, 4 blocks, bfloat16": {"hidden": 2048, "layers": 4, "intermediate": 5632, "heads": 32, "kv_heads": 8},
}


def start(path: Path, blocks: int, *, deterministic: bool) -> Engine:
    source = resolve(str(path))
    finish = partial(finish_block, deterministic=deterministic)  # as nodes do
    span = load_span(source, 0, blocks, dtype=source.dtype, device="cpu", finish=finish)
    if deterministic:
        for block in span.blocks:
            make_deterministic(block)
    engine = Engine(span, cache_tokens=16384, deterministic=deterministic)
    engine.start()
    return engine


def decode_seconds(engine: Engine, sessions: int, steps: int = 8, prompt: int = 40) -> float:
    """CPU seconds of the quickest step of ``sessions`` sessions together, each at another length."""
    size, last = engine.span.hidden_size, engine.span.end
    opened = [engine.open(rows=1, first=0, last=last) for _ in range(sessions)]
    at = [prompt + number for number in range(sessions)]
    for session, length in zip(opened, at, strict=True):
        engine.step(session, torch.randn(1, length, size), start=0).result()
    times = []
    for step in range(steps):
        token = torch.randn(1, 1, size)
        begin = time.process_time()
        futures = [engine.step(session, token, start=length + step) for session, length in zip(opened, at, strict=True)]
        for future in futures:
            future.result()
        times.append(time.process_time() - begin)
    for session in opened:
        engine.close(session)
    return min(times)


def prefill_seconds(engine: Engine, tokens: int = 256) -> float:
    session = engine.open(rows=1, first=0, last=engine.span.end)
    begin = time.process_time()
    engine.step(session, torch.randn(1, tokens, engine.span.hidden_size), start=0).result()
    seconds = time.process_time() - begin
    engine.close(session)
    return seconds


def changed(engine: Engine, steps: int = 20) -> int:
    """In how many of ``steps`` tokens of a session some bit is another one beside eight sessions than alone."""
    size, last = engine.span.hidden_size, engine.span.end
    inputs = torch.randn(1, 40 + steps, size, generator=torch.Generator().manual_seed(0))
    runs = []
    for others in (0, 8):
        session, *rest = (engine.open(rows=1, first=0, last=last) for _ in range(1 + others))
        outputs = [engine.step(session, inputs[:, :40], start=0).result()]
        for step in range(steps):
            futures = [engine.step(one, torch.randn(1, 1, size), start=step) for one in rest]
            at = 40 + step
            futures.append(engine.step(session, inputs[:, at : at + 1], start=at))
            outputs.append([future.result() for future in futures][-1])
        for one in (session, *rest):
            engine.close(one)
        runs.append(outputs[1:])
    return sum(not torch.equal(alone, beside) for alone, beside in zip(*runs, strict=True))


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[
        int, typer.Option(help="Turns of each measurement; the quickest counts, as other work only slows down.")
    ] = 5,
) -> None:
    """Measure the cost of determinism."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        for name, sizes in SIZES.items():
            options = {**sizes, "dtype": name.rpartition(" ")[2], "vocab": 300, "std": 0.02, "positions": 4096}
            path = make_checkpoint(Path(workdir) / str(sizes["hidden"]), make_config("llama-gqa", **options))
            plain, exact = (start(path, sizes["layers"], deterministic=wanted) for wanted in (False, True))
            measures = {
                "one stream, a step": partial(decode_seconds, sessions=1),
                "16 sessions, a step of all": partial(decode_seconds, sessions=16),
                "prefill of 256 tokens": prefill_seconds,
            }
            for what, measure in measures.items():
                measure(plain), measure(exact)
                times = [(measure(plain), measure(exact)) for _ in range(rounds)]
                usual, ours = (min(column) for column in zip(*times, strict=True))
                print(
                    f"{name}: {what}: {1e3 * usual:.1f} ms usual, {1e3 * ours:.1f} ms deterministic, "
                    f"ratio {ours / usual:.2f}, load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
            print(f"{name}: of 20 tokens changed by company: {changed(plain)} usual, {changed(exact)} deterministic")
            plain.stop(), exact.stop()


if __name__ == "__main__":
    typer.run(main)
