"""A private swarm on this machine: three nodes, each with a third of the built-in model, and a text through them all.

Run it by ``scripts/demo.sh``, which sets everything up.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.client.commands.local_swarm import LocalNode, LocalSwarm
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from swarm.client.model.model_session import ModelSession

MODEL = "demo"
SPANS = ("0:3", "3:6", "6:8")
PROMPT = "This method returns"


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
    with tempfile.TemporaryDirectory(prefix="swarm-demo-") as workdir, LocalSwarm(MODEL, Path(workdir)) as swarm:
        print(f"Starting a private swarm: {len(SPANS)} nodes, each with a third of the model…", flush=True)
        first = swarm.start(SPANS[0], name="node-1")
        import_client = threading.Thread(target=_import_client)
        import_client.start()
        _wait(swarm, [first])
        others = [swarm.start(blocks, name=f"node-{number}") for number, blocks in enumerate(SPANS[1:], start=2)]
        if kill_one:
            others.append(swarm.start(SPANS[1], name="spare"))
        import_client.join()
        _wait(swarm, others)
        print(f"Every block is served, after {time.monotonic() - begin:.1f} s.\n", flush=True)
        _generate(swarm, prompt, max_new_tokens, chat=chat, kill_one=kill_one)


def _wait(swarm: LocalSwarm, nodes: list[LocalNode]) -> None:
    try:
        swarm.wait(nodes)
    except SwarmError as error:
        raise SystemExit(f"Error: {error}") from error
    for node in nodes:
        assert node.ready is not None
        print(f"  {node.name} serves, peer …{node.ready['peer_id'][-6:]}", flush=True)


def _import_client() -> None:
    """Takes seconds, so it goes on while the nodes start."""
    import swarm.client.commands.terminal  # noqa: F401


def _generate(swarm: LocalSwarm, prompt: str, max_new_tokens: int, *, chat: bool, kill_one: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.client import SwarmModelForCausalLM
    from swarm.client.commands.terminal import generate_text
    from swarm.model.source import resolve

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


def _kill_at(step: int, swarm: LocalSwarm, session: ModelSession) -> Callable[..., Any]:
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
