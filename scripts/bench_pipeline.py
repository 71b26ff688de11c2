"""What it is worth that hops work on a long prompt one behind the other: time to the first token of 4,096.

    python scripts/bench_pipeline.py [--size large] [--chunk 256]

Two nodes on loopback with half of the blocks and one thread each. Without pipelining the prompt is one step, which the
second node gets when the first one is done with all of it; both compute it in pieces of the same size as with it.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from swarm.compute.openmp import set_waiting

set_waiting()

import torch
from bench import BLOCKS, first_token_seconds, in_turns, make_model, run_nodes


def main(
    size: Annotated[str, typer.Option(help="small (hidden 512) or large (hidden 2048).")] = "small",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4095,
    chunk: Annotated[list[int] | None, typer.Option(help="Tokens of a step; several to compare. Default: 512.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 3,
) -> None:
    """Measure prefill with and without pipelining over two hops."""
    from swarm.client import SwarmModelForCausalLM

    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, one thread each, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    ids = torch.randint(100, 30000, (1, prompt), generator=torch.Generator().manual_seed(0))
    chunks = chunk or [512]
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        path, half, count = make_model(size, Path(workdir)), BLOCKS[size] // 2, BLOCKS[size]
        with run_nodes(path, (f"0:{half}", f"{half}:{count}"), 1) as peers:
            models = [
                SwarmModelForCausalLM.from_pretrained(
                    str(path), initial_peers=peers, prefix_reuse="off", prefill_tokens=tokens
                )
                for tokens in (prompt, *chunks)
            ]
            whole, *pipelined = in_turns(rounds, *(partial(first_token_seconds, model, ids) for model in models))
            print(f"one hop after the other: {whole:.2f} s")
            for tokens, seconds in zip(chunks, pipelined, strict=True):
                print(
                    f"pipelined, steps of {tokens}: {seconds:.2f} s, {whole / seconds:.2f} times as fast (target 1.6)"
                )
            for model in models:
                model.close()
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
