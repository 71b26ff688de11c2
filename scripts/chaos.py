"""Sessions without end while nodes die, freeze and lose their network: nothing may fail, hang or come out wrong.

    PYTHONPATH=. python scripts/chaos.py                          # 10 minutes
    PYTHONPATH=. python scripts/chaos.py --seconds 90 --sessions 4 --no-petals

Eight nodes of the built-in model cover every block at least twice; half of the sessions are threads of a Python client,
half are streams through a gateway, and a Petals client is counted apart. A fault comes every few seconds, and only to
nodes without which every block is still served. Each text is compared with transformers' of the whole model. Prints the
longest pauses by kind of fault, and what is left behind at the end; exits with 1 if a caller got an error or a wrong
token, if anything got stuck or was left, or if a node did not come back.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from resilience.faults import Faults, small_disk
from resilience.nodes import Gateway, Swarm
from resilience.probe import Figures, count_tasks, figures
from resilience.report import Outcome, counts, kept, pauses, summary
from resilience.sessions import Sessions, Tally, by_client, by_gateway, of_the_whole_model

SPANS = ((0, 4), (4, 8), (0, 4), (4, 8), (0, 3), (3, 6), (6, 8), (2, 8))
QUIET_SECONDS = 60.0
"""What is left of sessions is given up after so long."""
OF_SESSIONS = (
    "swarm_sessions",
    "swarm_sessions_queued",
    "swarm_queue_depth",
    "swarm_cache_tokens_used",
    "swarm_gateway_sessions",
    "swarm_gateway_queue_depth",
)
"""Metrics that are 0 when nobody uses the swarm."""


def left_behind(swarm: Swarm, gateway: Gateway) -> list[str]:
    """What nodes and the gateway still hold of sessions that have ended, after some time."""
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        found = {str(node): node.figures() for node in swarm.nodes if node.running.alive} | {
            "gateway": gateway.figures()
        }
        left = [
            f"{who}: {name} {what[name]:.0f}" for who, what in found.items() for name in OF_SESSIONS if what.get(name)
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1.0)


def hold(swarm: Swarm, gateway: Gateway) -> dict[str, Figures]:
    """What all processes hold."""
    time.sleep(2.0)  # tasks are counted every second
    held = {f"node {node.number}": node.held() for node in swarm.nodes if node.running.alive}
    return {**held, "gateway": gateway.held(), "client": figures(os.getpid(), count_tasks())}


def run(seconds: float, sessions: int, seed: int, petals: bool) -> Outcome:
    """All of it."""
    from swarm.client import SwarmModelForCausalLM

    texts, tally, seen = of_the_whole_model(), Tally(), None
    with ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-chaos-")))
        disk = stack.enter_context(small_disk(workdir / "disk"))
        swarm = stack.enter_context(Swarm(SPANS, workdir, disk))
        gateway = stack.enter_context(Gateway(swarm.peers, workdir))
        model = stack.enter_context(SwarmModelForCausalLM.from_pretrained("demo", initial_peers=swarm.peers))
        stack.callback(swarm.over.set)
        ways = [
            partial(by_gateway, gateway.url) if number % 2 else partial(by_client, model) for number in range(sessions)
        ]
        warm = Sessions(ways, texts, Tally())
        warm.start()
        warm.stop()
        left_behind(swarm, gateway)
        before = hold(swarm, gateway)
        going = Sessions(ways, texts, tally)
        faults = Faults(swarm, {"gateway": gateway.pid, "client": os.getpid()}, seed, max(10.0, seconds / 6))
        with ExitStack() as meanwhile:
            if petals:
                from resilience.petals import beside

                seen = meanwhile.enter_context(beside(swarm.peers, texts, workdir))
            going.start()
            faults.run(time.monotonic() + seconds)
            stuck = going.stop()
        left = left_behind(swarm, gateway)
        after = hold(swarm, gateway)
        with SwarmModelForCausalLM.from_pretrained("demo", initial_peers=swarm.peers) as late:
            by_client(late, texts[0], tally)  # the swarm can still be found
    return Outcome(
        seconds=seconds,
        faults=counts(faults.past, faults.kinds),
        texts=tally.done,
        tokens=tally.tokens,
        pauses=pauses(faults.past, tally.gaps),
        usual=summary([end - begin for begin, end in tally.gaps]),
        wrong=tally.wrong,
        failed=tally.failed,
        broken=faults.broken,
        repeated=faults.repeated,
        stuck=stuck,
        left=[*left, *kept(before, after)],
        held={name: (before[name], after[name]) for name in after},
        petals=asdict(seen) if seen is not None else {},
    )


def main(
    seconds: Annotated[float, typer.Option(help="How long faults go on.")] = 600.0,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same order of faults.")] = 1,
    petals: Annotated[bool, typer.Option(help="A Petals client beside them (scripts/petals/setup.sh).")] = True,
    save: Annotated[Path | None, typer.Option(help="Write what has come out to this file too, as JSON.")] = None,
) -> None:
    """Let faults come over a swarm in use."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order, as after Ctrl-C
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    outcome = run(seconds, sessions, seed, petals)
    print(f"{os.cpu_count()} cores, load {load:.1f} when it began and {os.getloadavg()[0]:.1f} at the end, seed {seed}")
    outcome.show()
    if save is not None:
        save.write_text(json.dumps(asdict(outcome), indent=1))
    if not outcome.good:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
