"""Sessions without end while nodes die, freeze and lose their network: nothing may fail, hang or come out wrong.

    python scripts/chaos.py                          # 10 minutes
    python scripts/chaos.py --seconds 90 --sessions 6

Eight nodes of the demo model cover every block at least twice; half of the sessions are threads of a client, half are
streams through a gateway. A fault comes every few seconds, and only to nodes without which every block is still
served. Each text is compared with that of the whole model in one process. Prints the longest pause of a session during
each fault, and what is left behind at the end; exits with 1 if anything failed, was wrong, got stuck or was left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from chaos_nodes import Node, Swarm

MODEL = "demo"
SPANS = ((0, 4), (4, 8), (0, 4), (4, 8), (0, 3), (3, 6), (6, 8), (2, 8))
PROMPTS = ("This method returns", "A list of the", "Raises an error if", "The first argument")
TOKENS = 48
STUCK = 300.0
"""Seconds after which a session that has got no token is given up."""


@dataclass
class Tally:
    """What sessions have seen. ``gaps``: begin and end of each wait for a token, of all sessions."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)

    def gap(self, since: float) -> float:
        """Notes a token; the time now."""
        now = time.monotonic()
        self.gaps.append((since, now))
        return now

    def end(self, text: object, expected: object) -> None:
        """Notes a text."""
        self.done += 1
        if text != expected:
            self.wrong.append(f"{text!r} instead of {expected!r}")


@dataclass(frozen=True)
class Fault:
    """``kind`` from ``begin`` to ``end``, seconds of the monotonic clock."""

    kind: str
    begin: float
    end: float


class Faults:
    """What is done to nodes, one after the other, as ``numbers`` have it."""

    def __init__(self, swarm: Swarm, num_blocks: int, numbers: random.Random) -> None:
        self._swarm, self._blocks, self._numbers = swarm, num_blocks, numbers
        self.past: list[Fault] = []
        self._kinds: dict[str, Callable[[Node], None]] = {
            "kill -9": self._kill,
            "SIGTERM": self._terminate,
            "SIGSTOP": self._freeze,
            "daemon killed": self._kill_daemon,
            "all dropped": lambda node: self._slow(node, float("inf")),
            "2 s late": lambda node: self._slow(node, 2.0),
        }

    def run(self, until: float) -> None:
        """Faults until then, the last of which has ended."""
        with ThreadPoolExecutor(4) as pool:
            under_way: list[Future[None]] = []
            while time.monotonic() < until:
                spare = [node for node in self._swarm.nodes if node.serves and self._swarm.spare(node, self._blocks)]
                if spare:
                    node = self._numbers.choice(spare)
                    node.busy = True
                    under_way.append(pool.submit(self._happen, node, self._numbers.choice(list(self._kinds))))
                time.sleep(self._numbers.uniform(2.0, 5.0))
        for future in under_way:
            future.result()

    def _happen(self, node: Node, kind: str) -> None:
        begin = time.monotonic()
        print(f"{kind} for blocks {node.blocks[0]}:{node.blocks[1]}", flush=True)
        try:
            self._kinds[kind](node)
        finally:
            self.past.append(Fault(kind, begin, time.monotonic()))
            node.busy = False

    def _kill(self, node: Node) -> None:
        assert node.process is not None
        node.process.kill()
        self._again(node)

    def _terminate(self, node: Node) -> None:
        assert node.process is not None
        node.process.terminate()
        self._again(node)

    def _freeze(self, node: Node) -> None:
        assert node.process is not None
        node.process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "Tt" or time.sleep(0.1) is None
        time.sleep(self._numbers.uniform(5.0, 20.0))
        node.process.send_signal(signal.SIGCONT)

    def _kill_daemon(self, node: Node) -> None:
        """It is to come back by itself, or to end, so that a supervisor starts it again."""
        assert node.process is not None
        daemon = self._swarm.daemon_of(node)
        assert daemon is not None, "the node has no daemon"
        os.kill(daemon, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and node.process.poll() is None:
            time.sleep(0.2)
            if self._swarm.daemon_of(node) not in (None, daemon):
                return
        node.process.kill()
        self._again(node)

    def _slow(self, node: Node, delay: float) -> None:
        self._swarm.links.delay[node.port] = delay
        time.sleep(self._numbers.uniform(5.0, 15.0))
        del self._swarm.links.delay[node.port]

    def _again(self, node: Node) -> None:
        assert node.process is not None
        node.process.wait(timeout=60)
        time.sleep(self._numbers.uniform(0.0, 3.0))
        self._swarm.start(node)
        self._swarm.wait(node)


def of_the_whole_model() -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """For each prompt its ids, the ids that transformers continues it by, and their text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.model.source import resolve

    path = resolve(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    whole = AutoModelForCausalLM.from_pretrained(path)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    made = [whole.generate(one, **LENGTH)[0, one.shape[1] :] for one in ids]
    return ids, made, [tokenizer.decode(one, skip_special_tokens=True) for one in made]


LENGTH: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS}


def by_client(model: Any, ids: torch.Tensor, expected: torch.Tensor, tally: Tally) -> None:
    """One text through the Python client."""
    since = time.monotonic()

    def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal since
        since = tally.gap(since)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    made = model.generate(ids, stopping_criteria=[note], **LENGTH)[0, ids.shape[1] :]
    tally.end(made.tolist(), expected.tolist())


def by_gateway(url: str, prompt: str, expected: str, tally: Tally) -> None:
    """One text through the gateway."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    since, text = time.monotonic(), ""
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=STUCK) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"the gateway answers {reply.status_code}: {reply.read().decode()[:300]}")
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                since = tally.gap(since)
                text += event["choices"][0]["text"] if event["choices"] else ""
    tally.end(text, expected)


@contextmanager
def run_gateway(peers: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """``swarm gateway``; its address and process."""
    command = [sys.executable, "-c", "from swarm.client.cli import main; main()", "gateway", MODEL, "--port", "0"]
    command += [part for peer in peers for part in ("--initial-peers", peer)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        threading.Thread(target=process.stdout.read, daemon=True).start()  # its log
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def pauses(faults: list[Fault], gaps: list[tuple[float, float]]) -> dict[str, list[float]]:
    """For each kind of fault, the longest wait for a token that began during each, or up to 2 s after it."""
    found: dict[str, list[float]] = {}
    for fault in faults:
        waits = [end - begin for begin, end in gaps if end > fault.begin and begin < fault.end + 2.0]
        if waits:
            found.setdefault(fault.kind, []).append(max(waits))
    return found


def descriptors(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def left_behind(swarm: Swarm, seconds: float) -> list[str]:
    """What nodes still hold of sessions that have ended, after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for node in swarm.nodes:
            figures = swarm.figures(node)
            for name in ("swarm_sessions", "swarm_sessions_queued", "swarm_queue_depth"):
                if figures[name]:
                    left.append(f"node {node.blocks[0]}:{node.blocks[1]}: {name} {figures[name]:.0f}")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1.0)


def main(
    seconds: Annotated[float, typer.Option(help="How long faults go on.")] = 600.0,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same faults.")] = 1,
) -> None:
    """Let faults come over a swarm in use."""
    from swarm.client import SwarmModelForCausalLM

    torch.set_num_threads(1)
    ids, made, texts = of_the_whole_model()
    tally, numbers = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="swarm-chaos-") as workdir, Swarm(MODEL, SPANS, Path(workdir)) as swarm:
        peers = swarm.peers
        with (
            run_gateway(peers, Path(workdir, "gateway.log")) as (url, gateway),
            SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=peers) as model,
        ):
            until = time.monotonic() + seconds

            def go_on(number: int) -> None:
                turn = number
                while time.monotonic() < until:
                    which = turn % len(PROMPTS)
                    try:
                        if number % 2:
                            by_gateway(url, PROMPTS[which], texts[which], tally)
                        else:
                            by_client(model, ids[which], made[which], tally)
                    except Exception as error:
                        tally.failed.append(f"{type(error).__name__}: {error}")
                        print(f"FAILED: {tally.failed[-1]}", flush=True)
                        time.sleep(1.0)
                    turn += 1

            threads = [threading.Thread(target=go_on, args=(number,), daemon=True) for number in range(sessions)]
            for thread in threads:
                thread.start()
            time.sleep(3.0)
            before = descriptors(gateway), descriptors(os.getpid())
            faults = Faults(swarm, 8, numbers)
            faults.run(until)
            deadline = time.monotonic() + STUCK
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            stuck = sum(thread.is_alive() for thread in threads)
            left = left_behind(swarm, 60.0)
            after = descriptors(gateway), descriptors(os.getpid())
    print(f"\n{tally.done} texts of up to {TOKENS} tokens, {len(faults.past)} faults in {seconds:.0f} s")
    for kind, longest in sorted(pauses(faults.past, tally.gaps).items()):
        longest.sort()
        worst = longest[min(len(longest) - 1, int(0.99 * len(longest)))]
        print(f"{kind:14} {len(longest):3} times: pause {statistics.median(longest):.2f} s, 99 % {worst:.2f} s")
    print(f"descriptors of the gateway {before[0]} -> {after[0]}, of the client {before[1]} -> {after[1]}")
    for what in (*tally.wrong, *left):
        print(what)
    print(f"failed {len(tally.failed)}, wrong {len(tally.wrong)}, stuck {stuck}, left behind {len(left)}")
    if tally.failed or tally.wrong or stuck or left:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
