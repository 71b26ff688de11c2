"""A program of somebody's, run by test_programs.py: it seeds its generators, and it forks. Prints a JSON object."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.model.source import resolve

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 2}
IDS = torch.tensor([[0, 659, 628, 306]])


def states() -> tuple[list[int], tuple[Any, ...], str]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def in_child(*works: Callable[[], object]) -> list[str]:
    """What becomes of each of ``works`` in a fork, which then ends as a process ends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # what hangs is ended
        said = []
        for work in works:
            try:
                said.append(str(work()))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        os.write(writing, json.dumps(said).encode())
        os.close(writing)
        sys.exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status} and said {text!r}"
    answers: list[str] = json.loads(text)
    return answers


def main() -> None:
    peers = sys.argv[1:]
    whole: Any = AutoModelForCausalLM.from_pretrained(resolve("demo").path)

    def join() -> Any:
        return SwarmModelForCausalLM.from_pretrained("demo", initial_peers=peers)

    told: dict[str, Any] = {}
    before = states()
    told["before the first model"] = in_child(lambda: type(join()).__name__)
    model = join()
    told["drawn by from_pretrained"] = states() != before
    torch.manual_seed(5)
    first = model.generate(IDS, do_sample=True, **OPTIONS)
    torch.manual_seed(5)
    told["seeded as transformers"] = first.tolist() == whole.generate(IDS, do_sample=True, **OPTIONS).tolist()
    before = states()
    with model.session(max_length=40) as session, torch.no_grad():
        model.generate(IDS, **OPTIONS)
        model(IDS, past_key_values=session.cache)
        model.blocks[1:3](torch.ones(1, 2, model.config.hidden_size))
        told["drawn by use"] = states() != before
        told["child"] = in_child(
            lambda: model.generate(IDS, **OPTIONS), lambda: model(IDS), join, session.close, model.close
        )
        told["parent goes on"] = model.generate(IDS, **OPTIONS).tolist() == whole.generate(IDS, **OPTIONS).tolist()
    model.close()
    told["after closing"] = in_child(join)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
