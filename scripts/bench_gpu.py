#!/usr/bin/env python3
"""How fast nodes generate on one GPU, beside the memory bandwidth that bounds them.

    python scripts/bench_gpu.py                                      # the largest model that fits, unquantized
    python scripts/bench_gpu.py --model llama-2-70b --scheme nf4
    python scripts/bench_gpu.py --device cpu --tiny                  # the same code on a toy, to see that it runs

What is measured: three nodes' engines on one card, each with a third of a model's blocks, in one process. Sessions are
threads that hand each token's hidden states from engine to engine through the machine's memory. Blocks, KV cache,
batching, quantization and recorded decode steps are those that `swarm-node` serves with.

What is not: the network, messages and their checks; the client's embeddings, output head and sampling. Weights are
random, made on the card, of the true geometry: that changes nothing of the time that it takes to read and multiply
them, but nothing can be said of the text. One card does the work of three, so a prompt's pieces do not overlap in them.

The share of bandwidth is the bytes that the weights take, times passes through all blocks in a second, by what a plain
copy on this card reads and writes in a second. With many sessions a pass serves several tokens, up to one for each.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from swarm.compute.openmp import set_waiting

set_waiting()

import torch
import typer
from make_checkpoint import make_config
from torch import nn

from swarm.model.loading import assemble_span
from swarm.model.model_source import ModelSource
from swarm.model.skeleton import build_skeleton
from swarm.model.span import Span
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.quantization import find_scheme
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import accelerate
from swarm.node.engine.gpu.static_decode import Record, Step
from swarm.node.engine.scheduling.row_group import RowGroup
from swarm.node.hosting.placement.hardware import free_memory

BITS = {"none": 16.0, "int8": 8.5, "nf4": 4.5, "int4": 4.5}
"""About how many bits a weight takes, to choose a model that fits."""

WARM_UP, WARM_UPS = 4, 8
"""Tokens of each session before the measured ones, and how often at most: until nothing new is recorded."""


@dataclass(frozen=True)
class Geometry:
    """A model's shape, as for ``make_config``, and how many weights its blocks have, in billions."""

    like: str
    billions: float
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


MODELS = {
    "llama-2-7b": Geometry("llama-mha", 6.5, 4096, 32, 32, 32, 11008),
    "llama-2-13b": Geometry("llama-mha", 12.7, 5120, 40, 40, 40, 13824),
    "llama-2-70b": Geometry("llama-gqa", 68.5, 8192, 80, 64, 8, 28672),
    "falcon-180b": Geometry("falcon-180b", 178.6, 14848, 80, 232, 8, 4 * 14848),
    "tiny": Geometry("llama-gqa", 0.0, 64, 6, 4, 2, 128),
}
TARGETS = {("llama-2-70b", 1): 30.0, ("llama-2-70b", 32): 600.0, ("falcon-180b", 1): 15.0}
"""Tokens a second that we want with 4 bits a weight, by model and sessions."""


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    sessions: int
    context: int
    recorded: bool
    prefill: float
    total: float
    passes: float


def source_of(name: str, dtype: torch.dtype) -> ModelSource:
    """The model of this name, as far as its config goes: there is no checkpoint."""
    shape = MODELS[name]
    config = make_config(
        shape.like,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate=shape.intermediate,
        vocab=32000,
        positions=4096,
    )
    return ModelSource(name, Path(), config, "bench", dtype)


def build_node(name: str, scheme: str, start: int, end: int, device: torch.device, dtype: torch.dtype) -> Span:
    """Blocks ``start:end`` with random weights, made on ``device`` one block at a time."""
    source = source_of(name, dtype)
    skeleton = build_skeleton(source, dtype, attention="eager")

    def fill(index: int, device: torch.device) -> None:
        for module in skeleton.layers[index].modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                if parameter.dim() > 1:
                    values.normal_(std=0.5 * parameter.shape[-1] ** -0.5)  # so that states stay of about one size
                else:
                    values.fill_(float(key == "weight"))
                setattr(module, key, nn.Parameter(values, requires_grad=False))

    found = None if scheme == "none" else find_scheme(scheme, device, dtype)
    finish = partial(finish_block, scheme=found)
    devices = [device] * (end - start)
    return assemble_span(source, skeleton, start, dtype=dtype, devices=devices, fill=fill, finish=finish)


def held_bytes(spans: Sequence[Span]) -> int:
    """Memory of the spans' tensors, whatever their layers keep them as."""
    tensors: dict[int, torch.Tensor] = {}
    for module in (module for span in spans for module in span.blocks.modules()):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        tensors |= {id(tensor): tensor for tensor in own if isinstance(tensor, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written in a second by a plain copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    rounds = 10
    began = time.perf_counter()
    for _ in range(rounds):
        target.copy_(source)
    synchronize(device)
    return 2 * size * rounds / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stream:
    """One session through all engines."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._handles: list[RowGroup] = [
            engine.open(rows=1, first=engine.span.start, last=engine.span.end) for engine in engines
        ]
        self._position = 0

    def step(self, hidden: torch.Tensor) -> None:
        """``hidden`` ``[1, T, H]`` through all of them."""
        for engine, handle in zip(self._engines, self._handles, strict=True):
            hidden = engine.step(handle, hidden, start=self._position).result()
        self._position = handle.position

    def decode(self, hidden: torch.Tensor, steps: int) -> None:
        """The same token ``steps`` times."""
        for _ in range(steps):
            self.step(hidden)

    def close(self) -> None:
        for engine, handle in zip(self._engines, self._handles, strict=True):
            engine.close(handle)


class Recordings:
    """Counts the decode steps that could be recorded: where one can't be, the engine goes on without."""

    def __init__(self) -> None:
        self.made = 0

    def counted(self, record: Record) -> Record:
        def recorded(device: torch.device, step: Step) -> Step:
            recording = record(device, step)
            self.made += 1
            return recording

        return recorded


@contextlib.contextmanager
def running(spans: Sequence[Span], cache_tokens: int, graphs: bool) -> Iterator[tuple[list[Engine], Recordings]]:
    """Engines of ``spans``, and what they record."""
    engines: list[Engine] = []
    recordings = Recordings()
    try:
        for span in spans:
            acceleration = accelerate(span, graphs=graphs)
            if acceleration.record is not None:
                acceleration = replace(acceleration, record=recordings.counted(acceleration.record))
            engines.append(Engine(span, cache_tokens=cache_tokens, acceleration=acceleration))
            engines[-1].start()
        yield engines, recordings
    finally:
        for engine in engines:
            engine.stop()
        engines.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(engines: Sequence[Engine], recordings: Recordings, sessions: int, context: int, steps: int) -> Run:
    """Fills ``sessions`` with ``context`` tokens each, the first alone for the time, then decodes together."""
    hidden_size = engines[0].span.hidden_size
    generator = torch.Generator().manual_seed(0)
    prompt, token = (torch.randn(1, length, hidden_size, generator=generator) for length in (context, 1))
    first = Stream(engines)
    first.step(prompt)  # whatever is compiled or allocated once
    first.close()
    streams = [Stream(engines) for _ in range(sessions)]
    try:
        began = time.perf_counter()
        streams[0].step(prompt)
        prefill = context / (time.perf_counter() - began)
        with ThreadPoolExecutor(sessions) as threads:
            list(threads.map(lambda stream: stream.step(prompt), streams[1:]))
            for _ in range(WARM_UPS):
                made = recordings.made
                list(threads.map(lambda stream: stream.decode(token, WARM_UP), streams))
                if made == recordings.made:
                    break
            before = engines[0].stats().batches
            began = time.perf_counter()
            list(threads.map(lambda stream: stream.decode(token, steps), streams))
            seconds = time.perf_counter() - began
            batches = engines[0].stats().batches - before
    finally:
        for stream in streams:
            stream.close()
    return Run(sessions, context, recordings.made > 0, prefill, sessions * steps / seconds, batches / seconds)


def say(name: str, scheme: str, runs: Sequence[Run], weights: int, bandwidth: float) -> None:
    """The table, in Markdown."""
    print(f"\n**{name}, {scheme}**: {weights / 2**30:.2f} GiB of weights, copies at {bandwidth / 1e9:.0f} GB/s\n")
    print("| sessions | context | decode steps | prefill | total | a stream | share of bandwidth | target |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        target = TARGETS.get((name, run.sessions)) if BITS[scheme] < 5 else None
        cells = [
            str(run.sessions),
            str(run.context),
            "recorded" if run.recorded else "one by one",
            f"{run.prefill:.0f} tok/s",
            f"{run.total:.1f} tok/s",
            f"{run.total / run.sessions:.1f} tok/s",
            f"{weights * run.passes / bandwidth:.0%}",
            "" if target is None else f"{target:.0f} tok/s: {'met' if run.total >= target else 'missed'}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def largest_that_fits(free: int, scheme: str) -> str:
    """The largest model whose weights leave a quarter of the memory for the KV cache and everything else."""
    fitting = [name for name, shape in MODELS.items() if shape.billions * 1e9 * BITS[scheme] / 8 < 0.75 * free]
    best = max(fitting, key=lambda name: MODELS[name].billions)
    if best == "tiny":
        raise SystemExit(f"{free / 2**30:.1f} GiB are free, too little for any of {', '.join(MODELS)}")
    return best


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(MODELS)}.")] = "auto",
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(BITS)}.")] = "none",
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model and short runs: checks the code.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Engines that share the blocks.")] = 3,
    sessions: Annotated[str, typer.Option(help="How many at a time.")] = "1,32",
    contexts: Annotated[str, typer.Option(help="Tokens before the first that is measured.")] = "128,2048",
    steps: Annotated[int, typer.Option(min=1, help="Tokens measured for each session.")] = 64,
) -> None:
    """Measure decode and prefill on one GPU."""
    where = torch.device(device)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(
                f"This measures a GPU, and torch {torch.__version__} finds none: it needs an NVIDIA card with its "
                "driver, and a build of torch for CUDA (see pytorch.org). --device cpu --tiny checks the code."
            )
        where = torch.device("cuda", where.index or 0)
        torch.cuda.set_device(where)
        print(f"{torch.cuda.get_device_name(where)}, torch {torch.__version__}")
    if scheme not in BITS:
        raise SystemExit(f"--scheme is one of {', '.join(BITS)}")
    if tiny:
        model, sessions, contexts, steps = "tiny", "1,4", "16,40", min(steps, 6)
    name = largest_that_fits(free_memory(where), scheme) if model == "auto" else model
    if name not in MODELS:
        raise SystemExit(f"--model is auto or one of {', '.join(MODELS)}")
    layers = MODELS[name].layers
    edges = [layers * part // nodes for part in range(nodes + 1)]
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    bandwidth = copy_bandwidth(where, 1 << (24 if tiny else 30))
    spans = [build_node(name, scheme, start, end, where, dtype) for start, end in itertools.pairwise(edges)]
    weights = held_bytes(spans)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated(where)
    runs: list[Run] = []
    page = 256
    for graphs in (True, False) if where.type == "cuda" else (False,):
        for count in numbers(sessions):
            for context in numbers(contexts):
                each = -(-(context + WARM_UP * WARM_UPS + steps) // page) * page  # a session's last page is seldom full
                try:
                    with running(spans, count * each, graphs) as (engines, recordings):
                        runs.append(measure(engines, recordings, count, context, steps))
                except torch.OutOfMemoryError as error:
                    print(f"{count} sessions of {context} tokens: {error}", file=sys.stderr)
    say(name, scheme, runs, weights, bandwidth)


if __name__ == "__main__":
    typer.run(main)
