"""A lab for each test, where that is permitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.model.source import resolve
from tests.net.lab import Lab, make_lab, why_not
from tests.net.swarms import PROMPT, TOKENS, NetSwarm


@pytest.fixture(scope="session")
def permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab(permitted: None) -> Iterator[Lab]:
    with make_lab() as made:
        yield made


@pytest.fixture
def swarm(lab: Lab, tmp_path: Path) -> Iterator[NetSwarm]:
    running = NetSwarm(tmp_path)
    yield running
    running.close()


@pytest.fixture(scope="session")
def right() -> str:
    """What the whole model says."""
    path = resolve("demo").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(path).generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :]))
