"""Speed of a swarm on this machine, as ratios to transformers' own ``generate`` in one process, taken in one run.

    python scripts/bench.py                 # everything; about ten minutes on two cores
    python scripts/bench.py --only small    # one of: small, large, sessions, prefill, quantization

Models are made on the spot with random weights. Two nodes on loopback, each with half of the blocks, and the same
number of threads for everyone. Ours and theirs are measured in turns, and the medians of the turns are compared.
Quantized nodes are compared with one in bfloat16 instead: one node each, with all blocks of the large model.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.compute.openmp import set_waiting

set_waiting()  # as the commands swarm and swarm-node do; it holds for both sides of the comparison

import torch

HERE = Path(__file__).parent
SIZES = {
    "large": ["--hidden", "2048", "--layers", "16", "--intermediate", "5632", "--heads", "32", "--kv-heads", "8"],
    "hop": ["--hidden", "2048", "--layers", "2", "--intermediate", "256", "--heads", "32", "--kv-heads", "8"],
    "small": ["--hidden", "512", "--layers", "8", "--intermediate", "1376", "--heads", "8", "--kv-heads", "8"],
}
DTYPES = {"large": "bfloat16", "hop": "bfloat16", "small": "float32"}
BLOCKS = {"large": 16, "small": 8}
TARGETS = {
    "large: one stream, ours / transformers": 1.3,
    "small: one stream, ours / transformers": 0.9,
    "large: 16 sessions together / one stream": 7.0,
    "large: one stream, int8 / bfloat16": 1.0,
    "large: one stream, nf4 / bfloat16": 1.8,
    "large: one stream, int4 / bfloat16": 1.8,
}


def make_model(size: str, into: Path) -> Path:
    """A Llama of this size with random weights."""
    path = into / f"llama-{size}"
    command = [sys.executable, str(HERE / "make_checkpoint.py"), "llama", "--like", "llama-gqa", "--out", str(path)]
    command += SIZES[size]
    command += ["--vocab", "32000", "--positions", "4096", "--dtype", DTYPES[size], "--std", "0.02"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


@contextlib.contextmanager
def run_nodes(path: Path, spans: Sequence[str], threads: int, *options: str) -> Iterator[list[str]]:
    """Nodes for these spans, started with ``options``; gives the addresses to join by."""
    processes: list[subprocess.Popen[str]] = []
    peers: list[str] = []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        for span in spans:
            command = [str(Path(sys.executable).with_name("swarm-node")), "serve", str(path), "--blocks", span]
            command += ["--host", "127.0.0.1", "--log-format", "json", *options]
            command += [option for peer in peers for option in ("--initial-peers", peer)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            processes.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "ready":
                    peers = peers or event["maddrs"][:1]
                    threading.Thread(target=process.stdout.read, daemon=True).start()
                    break
            else:
                raise SystemExit(f"Error: the node for {span} did not start")
        yield peers
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=20)


def decode_seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds a token, without the prefill."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=1 + tokens, **options)
    return (time.perf_counter() - begin - first) / tokens


def first_token_seconds(model: Any, ids: torch.Tensor) -> float:
    """Seconds from the prompt to the first token."""
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    return time.perf_counter() - begin


def in_turns(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measure, taken in turns after one turn that doesn't count."""
    for measure in measures:
        measure()
    taken: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for measure, values in zip(measures, taken, strict=True):
            values.append(measure())
    return [statistics.median(values) for values in taken]


def together_tokens_per_second(model: Any, ids: torch.Tensor, sessions: int, tokens: int) -> float:
    """Decode speed of all sessions together, while all of them run."""
    started = threading.Barrier(sessions)
    steps: list[list[float]] = []

    def run(number: int) -> None:
        times: list[float] = []
        steps.append(times)

        def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        started.wait()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "stopping_criteria": [note]}
        model.generate((ids + number) % 30000, max_new_tokens=tokens, **options)

    with ThreadPoolExecutor(sessions) as pool:
        list(pool.map(run, range(sessions)))
    begin, end = max(times[0] for times in steps), min(times[-1] for times in steps)
    return sum(sum(begin < moment <= end for moment in times) for times in steps) / (end - begin)


def main(
    only: Annotated[
        str | None, typer.Option(help="small, large, sessions, prefill or quantization; default: all.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = os.cpu_count() or 1,
    tokens: Annotated[int, typer.Option(help="Tokens of each measurement.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 5,
) -> None:
    """Measure a swarm of two nodes on this machine against transformers in one process."""
    from transformers import AutoModelForCausalLM

    from swarm.client import SwarmModelForCausalLM

    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {threads} threads, load {load:.1f}"
    )
    print(f"{'measured':44} {'ours':>12} {'transformers':>14} {'ratio':>7} {'target':>7}")
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        for size in ("small", "large"):
            wanted = {size} if size == "small" else {"large", "sessions", "prefill", "quantization"}
            if only is not None and only not in wanted:
                continue
            path, half, count = make_model(size, Path(workdir)), BLOCKS[size] // 2, BLOCKS[size]
            if size == "large" and only in (None, "quantization"):
                bench_quantization(path, threads, tokens, rounds)
            if only == "quantization":
                continue
            with (
                run_nodes(path, (f"0:{half}", f"{half}:{count}"), threads) as peers,
                SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers, prefix_reuse="off") as model,
            ):
                whole = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
                ids = torch.randint(100, 30000, (1, 32), generator=torch.Generator().manual_seed(0))
                if only in (None, size, "sessions"):
                    ours, theirs = in_turns(
                        rounds, partial(decode_seconds, model, ids, tokens), partial(decode_seconds, whole, ids, tokens)
                    )
                    report(f"{size}: one stream, ours / transformers", 1 / ours, 1 / theirs, "tok/s")
                if size == "large" and only in (None, "sessions"):
                    many = statistics.median(together_tokens_per_second(model, ids, 16, tokens) for _ in range(3))
                    report("large: 16 sessions together / one stream", many, 1 / ours, "tok/s")
                if size == "large" and only in (None, "prefill"):
                    long = torch.randint(100, 30000, (1, 1024), generator=torch.Generator().manual_seed(1))
                    ours, theirs = in_turns(
                        rounds, partial(first_token_seconds, model, long), partial(first_token_seconds, whole, long)
                    )
                    report("large: first token of 1,024, seconds", ours, theirs, "s", at_most=1.15)


def bench_quantization(path: Path, threads: int, tokens: int, rounds: int) -> None:
    """One stream through a node of each kind, in turns."""
    from swarm.client import SwarmModelForCausalLM

    kinds = ("none", "int8", "nf4", "int4")
    ids = torch.randint(100, 30000, (1, 32), generator=torch.Generator().manual_seed(0))
    with contextlib.ExitStack() as stack:
        models = []
        for kind in kinds:
            peers = stack.enter_context(run_nodes(path, ("0:16",), threads, "--quantization", kind))
            models.append(stack.enter_context(SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers)))
        plain, *others = in_turns(rounds, *(partial(decode_seconds, model, ids, tokens) for model in models))
    for kind, seconds in zip(kinds[1:], others, strict=True):
        report(f"large: one stream, {kind} / bfloat16", 1 / seconds, 1 / plain, "tok/s")


def report(name: str, ours: float, theirs: float, unit: str, *, at_most: float | None = None) -> None:
    """One row of the table."""
    target = f"<{at_most}" if at_most is not None else f">{TARGETS[name]}"
    print(f"{name:44} {ours:7.2f} {unit:>5} {theirs:8.2f} {unit:>5} {ours / theirs:7.2f} {target:>7}", flush=True)


if __name__ == "__main__":
    typer.run(main)
