"""A client with versions that aren't tested checks the ends of its model's family before it joins a swarm."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swarm.client import SwarmModelForCausalLM
from swarm.client.model.family_check import require_right_ends
from swarm.compat import versions
from swarm.compat.versions import Versions
from swarm.errors import ConnectError, ModelError
from swarm.model import load_ends, skeleton
from tests.models import tiny_model

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWLmKfRzFrKg5fmyAZbGSDiXQMSFGwPQ4YNBSqWXGCUFpJ"


@pytest.fixture(autouse=True)
def _untested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SWARM_UNTESTED", raising=False)
    monkeypatch.setattr(versions, "TESTED", (Versions("1.0.0", "1.0.0"),))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_next", "deepseek_v3", "gemma3n_text", "gpt2"])
def test_what_is_right_is_found_right(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    require_right_ends(model_type, SwarmModelForCausalLM.from_ends)
    assert caplog.text.count(f"checking a tiny {model_type} model") == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_embeddings_that_are_scaled_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fill: Any = skeleton.fill_buffers

    def fill_otherwise(model: Any, root: Any, *rest: Any) -> None:
        fill(model, root, *rest)
        for name, buffer in root.named_buffers():
            if name.endswith("embed_scale"):
                buffer *= 1.1

    monkeypatch.setattr(skeleton, "fill_buffers", fill_otherwise)
    with pytest.raises(ModelError, match=r"ends of gemma2 .*hidden states before the first block are off by"):
        require_right_ends("gemma2", SwarmModelForCausalLM.from_ends)


def test_a_norm_that_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Any = load_ends.load_weights

    def load_otherwise(model: Any, *rest: Any, **options: Any) -> Any:
        missing = load(model, *rest, **options)
        model.model.norm.weight.data.add_(0.1)
        return missing

    monkeypatch.setattr(load_ends, "load_weights", load_otherwise)
    with pytest.raises(ModelError, match=r"ends of llama .*logits are off by"):
        require_right_ends("llama", SwarmModelForCausalLM.from_ends)


def test_text_that_is_computed_again_at_each_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ``generate()`` shows that."""
    prepare = SwarmModelForCausalLM.prepare_inputs_for_generation

    def prepare_otherwise(model: Any, ids: torch.Tensor, **options: Any) -> dict[str, Any]:
        return prepare(model, ids, **(options | {"next_sequence_length": None}))

    monkeypatch.setattr(SwarmModelForCausalLM, "prepare_inputs_for_generation", prepare_otherwise)
    with pytest.raises(ModelError, match=r"ends of llama "):
        require_right_ends("llama", SwarmModelForCausalLM.from_ends)


def test_a_model_is_checked_before_a_swarm_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama-gqa")
    with monkeypatch.context() as wrong:
        wrong.setattr("swarm.client.model.family_check.check_ends", lambda tiny, from_ends: "logits are off by 3")
        with pytest.raises(ModelError, match=r"ends of llama .* llama-2: logits are off by 3\. Install a tested one"):
            SwarmModelForCausalLM.from_pretrained(path, initial_peers=NOBODY, startup_timeout=2)
    monkeypatch.setenv("SWARM_UNTESTED", "1")
    with pytest.raises(ConnectError):
        SwarmModelForCausalLM.from_pretrained(path, initial_peers=NOBODY, startup_timeout=2)
