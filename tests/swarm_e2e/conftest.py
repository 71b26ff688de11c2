"""The model that most tests of this folder use: whole, and as a client of the nodes that a module starts as `swarm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Swarm
from tests.swarm_e2e.processes import Processes


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny_model("llama-gqa", positions=2048)


@pytest.fixture(scope="module")
def whole(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def model(swarm: Swarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(swarm.model, initial_peers=swarm.initial_peers) as model:
        yield model


@pytest.fixture(scope="session")
def files() -> Path:
    """A model of some 12 MB, in shards."""
    return tiny_model("llama-gqa", sharded=True, hidden=192)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.close()
