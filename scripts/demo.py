"""A private swarm on this machine: three nodes, each with a third of the built-in model, and a text through them all.

Run it by ``scripts/demo.sh``, which sets everything up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from swarm.client.model_session import ModelSession

MODEL = "demo"
SPANS = ("0:3", "3:6", "6:8")
PROMPT = "This method returns"


@dataclass
class Node:
    """A ``swarm-node serve`` process."""

    blocks: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people: blocks and process."""
        return f"node {self.blocks} (pid {self.process.pid})"


class Swarm:
    """The processes of the demo; all of them end with the ``with``."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self.nodes: list[Node] = []
        self.peers: list[str] = []

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *exception: object) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.process.wait(timeout=12)
            except subprocess.TimeoutExpired:
                node.process.kill()

    def start(self, blocks: str, *, name: str) -> Node:
        """Starts a node; the first one is the swarm, the others join it."""
        command = [str(Path(sys.executable).with_name("swarm-node")), "serve", MODEL, "--blocks", blocks]
        command += ["--host", "127.0.0.1", "--log-format", "json", "--name", name]
        for peer in self.peers:
            command += ["--initial-peers", peer]
        log = (self._workdir / f"{name}.log").open("w")
        # a session of its own, so that Ctrl-C comes to this script alone, which ends the nodes in order
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        node = Node(blocks, process)
        self.nodes.append(node)
        threading.Thread(target=_follow, args=(node,), daemon=True).start()
        return node

    def wait(self, nodes: list[Node], timeout: float = 120.0) -> None:
        """Waits until the nodes serve."""
        deadline = time.monotonic() + timeout
        for node in nodes:
            while node.ready is None:
                if node.process.poll() is not None or time.monotonic() > deadline:
                    why = "; ".join(node.errors) or f"see {self._workdir}"
                    raise SystemExit(f"Error: {node.name} did not start: {why}")
                time.sleep(0.05)
            print(f"  {node.name} serves, peer …{node.ready['peer_id'][-6:]}", flush=True)


def _follow(node: Node) -> None:
    assert node.process.stdout is not None
    for line in node.process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            node.ready = event
        elif event["event"] == "error":
            node.errors.append(event["message"])


def main(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate.")] = 80,
    chat: Annotated[bool, typer.Option("--chat", help="Keep the swarm up and ask for prompts.")] = False,
    kill_one: Annotated[
        bool, typer.Option("--kill-one", help="Kill a node in mid-generation: a spare one takes over.")
    ] = False,
) -> None:
    """Start a private swarm of three nodes on this machine and generate text through them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="swarm-demo-") as workdir, Swarm(Path(workdir)) as swarm:
        print(f"Starting a private swarm: {len(SPANS)} nodes, each with a third of the model…", flush=True)
        first = swarm.start(SPANS[0], name="node-1")
        import_client = threading.Thread(target=_import_client)
        import_client.start()
        swarm.wait([first])
        assert first.ready is not None
        swarm.peers = first.ready["maddrs"][:1]
        others = [swarm.start(blocks, name=f"node-{number}") for number, blocks in enumerate(SPANS[1:], start=2)]
        if kill_one:
            others.append(swarm.start(SPANS[1], name="spare"))
        import_client.join()
        swarm.wait(others)
        print(f"Every block is served, after {time.monotonic() - begin:.1f} s.\n", flush=True)
        _generate(swarm, prompt, max_new_tokens, chat=chat, kill_one=kill_one)


def _import_client() -> None:
    """Takes seconds, so it goes on while the nodes start."""
    import swarm.client.terminal  # noqa: F401


def _generate(swarm: Swarm, prompt: str, max_new_tokens: int, *, chat: bool, kill_one: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.client import SwarmModelForCausalLM
    from swarm.client.terminal import generate_text
    from swarm.source import resolve

    path = resolve(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.peers) as model:
        whole = AutoModelForCausalLM.from_pretrained(path)

        def run(text: str, *, kill_one: bool) -> bool:
            # the first text is as long as asked for, prompts in the chat may end earlier
            options: dict[str, Any] = {"min_new_tokens": max_new_tokens} if text == prompt else {}
            length = {**options, "max_new_tokens": max_new_tokens, "do_sample": False}
            hooks: dict[str, Any] = {}
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            print(text, end="", flush=True)
            with model.session(max_length=ids.shape[1] + max_new_tokens) as session:
                if kill_one:
                    hooks["stopping_criteria"] = [_kill_at(max_new_tokens // 3, swarm, session)]
                made = generate_text(model, tokenizer, ids, **length, **hooks)
            print(f"\n{made.describe()}", flush=True)
            expected = whole.generate(ids, **length)
            same = expected.shape == made.ids.shape and bool((expected == made.ids).all())
            print(f"The whole model in one process continues it: {'identical' if same else 'DIFFERENTLY'}.", flush=True)
            if not same:
                print(tokenizer.decode(expected[0]), flush=True)
            return same

        if not run(prompt, kill_one=kill_one):
            raise SystemExit(1)
        while chat:
            try:
                line = input("\n> ")
            except (EOFError, KeyboardInterrupt):
                return
            if not line.strip():
                return
            run(line, kill_one=False)


def _kill_at(step: int, swarm: Swarm, session: ModelSession) -> Callable[..., Any]:
    """A stopping criterion that never stops, but kills the node in use for the middle blocks after ``step`` tokens."""
    import torch

    calls = 0

    def after_token(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            used = {hop.peer_id.to_base58() for hop in session.route}
            victim = next(
                node
                for node in swarm.nodes
                if node.blocks == SPANS[1] and node.ready is not None and node.ready["peer_id"] in used
            )
            print(f"\n  --- kill -9: {victim.name} ---", flush=True)
            os.kill(victim.process.pid, signal.SIGKILL)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    return after_token


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
