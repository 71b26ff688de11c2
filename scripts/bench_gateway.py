"""Many streams through a gateway against as many direct clients, on the same nodes: tokens per second of each.

    .venv/bin/python scripts/bench_gateway.py --streams 32

The nodes and the gateway are processes of their own. Direct clients are threads of one process that each call
``generate()``, and, with ``--processes``, processes with a thread each, which need some 400 MB of memory apiece. All
runs generate the same number of tokens from the same prompts, one after the other, in rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from swarm.client.commands.local_swarm import LocalSwarm

_CHILD = """
import json, sys
from swarm.client import SwarmModelForCausalLM
from transformers import AutoTokenizer
from swarm.model.source import resolve
model = SwarmModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=sys.argv[2].split())
tokenizer = AutoTokenizer.from_pretrained(resolve(sys.argv[1]).path)
ids = tokenizer(sys.argv[3], return_tensors="pt")["input_ids"]
tokens = int(sys.argv[4])
print("ready", flush=True)
for line in sys.stdin:
    made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    print(made.shape[1] - ids.shape[1], flush=True)
"""


def prompt(number: int) -> str:
    """Of stream ``number``."""
    return f"This method returns {number}"


def through_gateway(url: str, model: str, streams: int, tokens: int) -> int:
    """Streams by server-sent events; the number of tokens that came."""

    def stream(number: int) -> int:
        body = {"model": model, "prompt": prompt(number), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        usage = 0
        with client.stream("POST", f"{url}/completions", json={**body, **options}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if '"usage":{' in line:
                    usage = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
        return usage

    # one client for all: to make one reads certificates, which takes as long as some tokens
    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(streams) as pool:
        return sum(pool.map(stream, range(streams)))


def by_threads(model: Any, tokenizer: Any, streams: int, tokens: int) -> int:
    """Threads of this process that share a model."""

    def generate(number: int) -> int:
        ids = tokenizer(prompt(number), return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return int(made.shape[1] - ids.shape[1])

    with ThreadPoolExecutor(streams) as pool:
        return sum(pool.map(generate, range(streams)))


class Processes:
    """Clients in processes of their own that wait for the word to begin."""

    def __init__(self, model: str, peers: list[str], streams: int, tokens: int) -> None:
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, model, " ".join(peers), prompt(number), str(tokens)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(streams)
        ]
        for child in self._children:
            self._read(child)

    def run(self) -> int:
        """All of them once."""
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        return sum(int(self._read(child)) for child in self._children)

    def close(self) -> None:
        """Ends them."""
        for child in self._children:
            child.kill()
            child.wait()

    @staticmethod
    def _read(child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        return child.stdout.readline().strip()


def main(
    model: Annotated[str, typer.Argument(help="A directory or demo.")] = "demo",
    streams: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Of each stream.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    blocks: Annotated[list[str] | None, typer.Option(help="Spans of the nodes.")] = None,
    processes: Annotated[bool, typer.Option("--processes", help="Direct clients as processes too.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure tokens per second through a gateway and without one."""
    with tempfile.TemporaryDirectory() as workdir, LocalSwarm(model, Path(workdir)) as swarm:
        for number, span in enumerate(blocks or ["0:4", "4:8"]):
            swarm.wait([swarm.start(span, name=f"node-{number}")])
        command = [sys.executable, "-c", "from swarm.client.cli import main; main()", "gateway", model, "--port", "0"]
        command += ["--initial-peers", ",".join(swarm.peers), "--max-sessions", str(streams)]
        gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children: Processes | None = None
        try:
            assert gateway.stdout is not None
            url = json.loads(gateway.stdout.readline())["url"]
            threading.Thread(target=gateway.stdout.read, daemon=True).start()  # its log

            from transformers import AutoTokenizer

            from swarm.client import SwarmModelForCausalLM
            from swarm.model.source import resolve

            facade = SwarmModelForCausalLM.from_pretrained(model, initial_peers=swarm.peers)
            tokenizer = AutoTokenizer.from_pretrained(resolve(model).path)
            served = Path(model).name if Path(model).is_dir() else model
            runs: dict[str, Callable[[], int]] = {
                "gateway": lambda: through_gateway(url, served, streams, tokens),
                "threads": lambda: by_threads(facade, tokenizer, streams, tokens),
            }
            if processes:
                children = Processes(model, swarm.peers, streams, tokens)
                runs["processes"] = children.run
            for run in runs.values():  # warm up
                run()
            speeds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, run in runs.items():
                    begin = time.monotonic()
                    made = run()
                    speeds[name].append(made / (time.monotonic() - begin))
            facade.close()
        finally:
            gateway.terminate()
            gateway.wait()
            if children is not None:
                children.close()
    middle = {name: statistics.median(each) for name, each in speeds.items()}
    result = {"streams": streams, "tokens": tokens, "tokens_per_second": speeds} | {
        f"gateway/{name}": round(middle["gateway"] / value, 3) for name, value in middle.items() if name != "gateway"
    }
    if as_json:
        print(json.dumps(result))
        return
    for name, each in speeds.items():
        print(f"{name:10} {middle[name]:8.1f} tokens/s   ({', '.join(f'{speed:.1f}' for speed in each)})")
    for name, value in middle.items():
        if name != "gateway":
            print(f"gateway / {name}: {middle['gateway'] / value:.2f}")


if __name__ == "__main__":
    typer.run(main)
