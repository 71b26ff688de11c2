"""How much a long prompt slows down those who decode: eight sessions, and then a prefill of 4,096 tokens joins them.

    python scripts/bench_load.py                 # hidden 512
    python scripts/bench_load.py --size large    # hidden 2048
    python scripts/bench_load.py --prefix        # first token with and without another session's prefix of 1,024

Two nodes on loopback with half of the blocks each and random weights. Prints the time between two tokens of a session
before and during the prefill, and the ratio, which is to be at most 2.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.compute.openmp import set_waiting

set_waiting()

import torch
from bench import BLOCKS, first_token_seconds, make_model, run_nodes

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def random_ids(columns: int, seed: int) -> torch.Tensor:
    """A prompt that no other seed begins with."""
    return torch.randint(100, 30000, (1, columns), generator=torch.Generator().manual_seed(seed))


class Decoding:
    """A session that decodes in a thread until it is told to stop. ``times`` are those of its tokens."""

    def __init__(self, model: Any, seed: int, most: int) -> None:
        self.times: list[float] = []
        self._ended = threading.Event()
        options = {**OPTIONS, "max_new_tokens": most, "stopping_criteria": [self._note]}
        self._thread = threading.Thread(target=model.generate, args=(random_ids(32, seed),), kwargs=options)
        self._thread.start()

    def _note(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.full((ids.shape[0],), self._ended.is_set())

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between tokens, where both came between these times."""
        return [right - left for left, right in pairwise(self.times) if begin <= left and right <= end]

    def end(self) -> None:
        """After the next token."""
        self._ended.set()
        self._thread.join()


def under_load(model: Any, *, sessions: int, prompt: int, seconds: float) -> None:
    """Prints the table."""
    alone = first_token_seconds(model, random_ids(prompt, 1))
    decoding = [Decoding(model, 100 + number, 3000) for number in range(sessions)]
    while any(len(session.times) < 8 for session in decoding):
        time.sleep(0.05)
    begin = time.perf_counter()
    time.sleep(seconds)
    middle = time.perf_counter()
    busy = first_token_seconds(model, random_ids(prompt, 2))
    end = time.perf_counter()
    before = sorted(gap for session in decoding for gap in session.gaps(begin, middle))
    during = sorted(gap for session in decoding for gap in session.gaps(middle, end))
    for session in decoding:
        session.end()
    for name, gaps in (("before", before), ("during", during)):
        if not gaps:
            raise SystemExit(f"Error: no tokens {name} the prefill: the prompt is too short for this machine")
        worst = gaps[int(0.95 * len(gaps))]
        print(f"decode {name}: median {1e3 * statistics.median(gaps):.1f} ms, 95 % {1e3 * worst:.1f} ms, {len(gaps)}")
    ratio = statistics.median(during) / statistics.median(before)
    tail = during[int(0.95 * len(during))] / before[int(0.95 * len(before))]
    print(f"during / before: median {ratio:.2f}, 95 % {tail:.2f} (target: at most 2)")
    print(f"first token of {prompt}: {busy:.2f} s, with nobody else {alone:.2f} s")


def with_prefix(model: Any, *, length: int, rounds: int) -> None:
    """Prints the time to the first token of a prompt that another session has begun with, and of one that is new."""
    new: list[float] = []
    known: list[float] = []
    for number in range(1 + rounds):  # the first round doesn't count
        prefix = random_ids(length, 1000 + number)
        new.append(first_token_seconds(model, torch.cat([prefix, random_ids(16, number)], dim=1)))
        known.append(first_token_seconds(model, torch.cat([prefix, random_ids(16, 500 + number)], dim=1)))
    one, other = statistics.median(new[1:]), statistics.median(known[1:])
    print(
        f"first token after {length} + 16: new {one:.3f} s, known prefix {other:.3f} s, {one / other:.1f} times as fast"
    )


def main(
    size: Annotated[str, typer.Option(help="small (hidden 512) or large (hidden 2048).")] = "small",
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
    sessions: Annotated[int, typer.Option(help="Sessions that decode.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that joins them.")] = 4095,
    seconds: Annotated[float, typer.Option(help="How long to look before it does.")] = 8.0,
    prefix: Annotated[bool, typer.Option("--prefix", help="Measure the reuse of a prefix instead.")] = False,
) -> None:
    """Measure latency of decoding sessions while a long prompt is computed."""
    from swarm.client import SwarmModelForCausalLM

    torch.set_num_threads(threads)
    print(f"{os.cpu_count()} cores, {threads} threads each, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        # each session is promised room for all the tokens that it may come to
        cache = (sessions + 1) * 4096
        path, half, count = make_model(size, Path(workdir)), BLOCKS[size] // 2, BLOCKS[size]
        with (
            run_nodes(path, (f"0:{half}", f"{half}:{count}"), threads, "--cache-tokens", str(cache)) as peers,
            SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers) as model,
        ):
            if prefix:
                with_prefix(model, length=1024, rounds=5)
            else:
                under_load(model, sessions=sessions, prompt=prompt, seconds=seconds)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
