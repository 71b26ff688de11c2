"""An unmodified Petals client that uses the same swarm. It is counted apart: Petals' own code loses a text when a node
on its way dies."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from swarm.model.source import resolve
from tests.petals.models import write_old_fields
from tests.petals.peers import PYTHON, Client, Petals, closing

from .sessions import GREEDY, Text

OPTIONS = {"request_timeout": 5, "update_period": 2, "max_backoff": 0.5}
ANSWER_SECONDS = 120.0


@dataclass
class Beside:
    """What a Petals client has seen."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    clients: int = 1
    """So many were needed: one that hangs is replaced."""


def is_here() -> bool:
    """Whether Petals' environment has been made (``scripts/petals/setup.sh``)."""
    return PYTHON.exists()


@contextmanager
def beside(peers: Sequence[str], texts: Sequence[Text], workdir: Path) -> Iterator[Beside]:
    """A Petals client makes texts meanwhile."""
    seen, over = Beside(), threading.Event()
    with closing(Petals(workdir)) as petals:
        path = _readable(workdir / "demo")

        def connect() -> Client:
            return petals.client(path, "demo-hf", peers, **OPTIONS)

        thread = threading.Thread(target=_go_on, args=(connect, connect(), texts, seen, over), daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join(ANSWER_SECONDS)


def _go_on(
    connect: Callable[[], Client], client: Client, texts: Sequence[Text], seen: Beside, over: threading.Event
) -> None:
    turn = 0
    while not over.is_set():
        text = texts[turn % len(texts)]
        turn += 1
        try:
            made = client.ask("generate", ids=text.ids.tolist(), max_retries=8, timeout=ANSWER_SECONDS, **GREEDY)
        except AssertionError as error:
            seen.failed.append(str(error).strip().splitlines()[-1][:80])
        except TimeoutError as error:
            seen.failed.append(str(error).splitlines()[0])
            if not over.is_set():
                client.close()
                client = connect()
                seen.clients += 1
        else:
            seen.done += 1
            expected = torch.cat([text.ids[0], text.continued]).tolist()
            if made[0] != expected:
                seen.wrong.append(f"{made[0]} instead of {expected}")


def _readable(path: Path) -> Path:
    """A copy of the built-in model that Petals reads: with a head of its own, and with the old fields."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(resolve("demo").path, path)
    write_old_fields(path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return path
