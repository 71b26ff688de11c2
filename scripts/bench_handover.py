"""How long a session stands still when a node that it goes through is told to stop, at 4,096 tokens of context: with
what the node has in its KV cache handed over to another one, and with all of it computed again.

    python scripts/bench_handover.py [--size large]

Nodes on loopback, one for the first half of the blocks and two for the second, of which the one in use gets SIGTERM in
mid-generation. The pause is the longest time between two tokens. Both ways take turns.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.compute.openmp import set_waiting

set_waiting()

import torch
from bench import BLOCKS, make_model

from tests.swarm_e2e.nodes import Swarm, Zygote

TOKENS, STOP_AT = 32, 8


def pause(swarm: Swarm, path: Path, ids: torch.Tensor, handover_timeout: float) -> tuple[float, float]:
    """The longest and the median time between two tokens after the second hop's node was told to stop, in seconds."""
    from swarm.client import SwarmModelForCausalLM

    times: list[float] = []
    stopped: list[Any] = []
    with ExitStack() as stack:
        model = stack.enter_context(
            SwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=swarm.initial_peers, prefix_reuse="off", handover_timeout=handover_timeout
            )
        )
        session = stack.enter_context(model.session(max_length=ids.shape[1] + TOKENS))

        def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            if len(times) == STOP_AT:
                stopped.append(swarm.node_of(session.route[1].peer_id))
                os.kill(stopped[0].pid, signal.SIGTERM)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": TOKENS}
        model.generate(ids, session=session, stopping_criteria=[note], **options)
        if stopped[0].peer_id in {str(hop.peer_id) for hop in session.route}:
            raise RuntimeError("the generation ended before the node did: ask for more tokens")
    if Zygote.wait(stopped[0].pid):
        raise RuntimeError("the node did not end in order")
    swarm.revive()
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    return max(gaps[STOP_AT - 1 :]), statistics.median(gaps)


def main(
    size: Annotated[str, typer.Option(help="small (hidden 512) or large (hidden 2048).")] = "small",
    prompt: Annotated[int, typer.Option(help="Tokens of context when the node is told to stop, about.")] = 4056,
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 3,
) -> None:
    """Measure the pause with and without a handover."""
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, one thread each, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    ids = torch.randint(100, 30000, (1, prompt), generator=torch.Generator().manual_seed(0))
    ways = {"handed over": 10.0, "computed again": 0.0}
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as workdir:
        path, half, count = make_model(size, Path(workdir)), BLOCKS[size] // 2, BLOCKS[size]
        swarm = Swarm(path, Path(workdir))
        try:
            for blocks in (f"0:{half}", f"{half}:{count}", f"{half}:{count}"):
                swarm.add(blocks)
            taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, seconds in ways.items():
                    taken[way].append(pause(swarm, path, ids, seconds))
        finally:
            swarm.close()
    medians = {way: statistics.median(longest for longest, _ in pairs) for way, pairs in taken.items()}
    for way, pairs in taken.items():
        usual = statistics.median(each for _, each in pairs)
        each = ", ".join(f"{longest:.2f}" for longest, _ in pairs)
        print(f"{way}: pause {medians[way]:.3f} s ({each}), usually {usual:.3f} s a token")
    print(f"ratio {medians['computed again'] / medians['handed over']:.1f}, load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
