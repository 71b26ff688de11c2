"""Generations for hours: does anything grow in a node, the gateway or a client?

    PYTHONPATH=. python scripts/soak.py                    # one hour
    PYTHONPATH=. python scripts/soak.py --minutes 10

Nodes of the built-in model, a gateway and a Python client (this process) make texts without end, each compared with
transformers' of the whole model. Meanwhile the memory (RSS), files, threads and asyncio tasks of each process are
noted. After a time to settle, prints the growth per hour of each with a confidence interval; exits with 1 if one grows
for certain, or if a text failed or was wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from resilience.nodes import Gateway, Swarm
from resilience.probe import Figures, count_tasks, figures
from resilience.sessions import Sessions, Tally, by_client, by_gateway, of_the_whole_model
from resilience.slopes import theil_sen, thinned

SPANS = ((0, 4), (4, 8), (2, 8))
SAMPLE_SECONDS = 2.0
POINTS = 40
"""Medians of so many stretches make a slope."""
KINDS = {"MB": 2.0**20, "files": 1.0, "threads": 1.0, "tasks": 1.0}
"""What is noted of a process, and the size of its unit."""
NOTHING = {"MB": 1.0, "files": 1.0, "threads": 1.0, "tasks": 1.0}
"""Growth per hour that is no leak: less than this can't be told from how an allocator settles."""


def watch(held: dict[str, Callable[[], Figures]], seconds: float) -> np.ndarray:
    """What the processes hold, by sample, process and kind; NaN where no sample was taken. Takes no memory as it goes
    on, for it is in one of the processes that are watched."""
    count = int(seconds / SAMPLE_SECONDS)
    seen = np.full((count, len(held), len(KINDS)), np.nan)
    begin = time.monotonic()
    for sample in range(count):
        time.sleep(max(0.0, begin + (sample + 1) * SAMPLE_SECONDS - time.monotonic()))
        for number, look in enumerate(held.values()):
            seen[sample, number] = astuple(look())
    return seen


def growing(name: str, seen: np.ndarray, settle: float) -> list[str]:
    """Prints how much more one process holds per hour; the kinds of which it holds more and more."""
    found = []
    for (kind, unit), values in zip(KINDS.items(), seen.T, strict=True):
        values = values[int(settle / SAMPLE_SECONDS) :] / unit
        hours = [sample * SAMPLE_SECONDS / 3600 for sample in range(len(values))]
        slope = theil_sen(*thinned(hours, values.tolist(), POINTS))
        grows = slope.low > NOTHING[kind]
        first, last = np.median(values[: len(values) // 10 + 1]), np.median(values[-len(values) // 10 :])
        print(
            f"{name:10} {kind:8} {first:8.1f} -> {last:8.1f}   {slope.value:+8.2f} per hour, 95 %: {slope.low:+.2f} to "
            f"{slope.high:+.2f}{'   GROWS' if grows else ''}"
        )
        if grows:
            found.append(f"{name}: {kind}")
    return found


def soak(seconds: float, sessions: int, settle: float) -> bool:
    """Whether nothing grew, failed or was wrong."""
    from swarm.client import SwarmModelForCausalLM

    texts, tally = of_the_whole_model(), Tally(keep_gaps=False)
    with ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-soak-")))
        swarm = stack.enter_context(Swarm(SPANS, workdir))
        gateway = stack.enter_context(Gateway(swarm.peers, workdir))
        model = stack.enter_context(SwarmModelForCausalLM.from_pretrained("demo", initial_peers=swarm.peers))
        both = partial(by_client, model), partial(by_gateway, gateway.url)
        going = Sessions([both[number % 2] for number in range(sessions)], texts, tally)
        held: dict[str, Callable[[], Figures]] = {f"node {node.number}": node.held for node in swarm.nodes}
        held |= {"gateway": gateway.held, "client": lambda: figures(os.getpid(), count_tasks())}
        going.start()
        seen = watch(held, seconds)
        stuck = going.stop()
    print(f"\n{tally.done} texts, {tally.tokens} tokens in {seconds:.0f} s, the first {settle:.0f} s not counted")
    found = [kind for number, name in enumerate(held) for kind in growing(name, seen[:, number], settle)]
    print(f"wrong texts {len(tally.wrong)}, errors of callers {len(tally.failed)}, stuck {stuck}, growing {found or 0}")
    return not (tally.wrong or tally.failed or stuck or found)


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions at the same time.")] = 4,
    settle: Annotated[float | None, typer.Option(help="Seconds not counted; default: a fifth of the time.")] = None,
) -> None:
    """Look for what grows."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order, as after Ctrl-C
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    good = soak(minutes * 60, sessions, minutes * 12 if settle is None else settle)
    print(f"{os.cpu_count()} cores, load {load:.1f} when it began and {os.getloadavg()[0]:.1f} at the end")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
