"""Families that depart from the plain path, over real nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.model.family_check.table import CASES
from tests.families.over_nodes import OVER_NODES
from tests.models import make_checkpoint
from tests.swarm_e2e.nodes import Swarm, run_swarm
from tests.swarm_e2e.test_failover import at_token

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make(label: str, folder: Path) -> tuple[Path, Any, tuple[str, ...]]:
    """The tiny model of a family, the same whole, and the spans of its nodes."""
    case = next(case for case in CASES if case.label == label)
    path = make_checkpoint(folder, case.config(), seed=case.seed)
    spans = ("0:2", "1:4", "4:5") if len(case.spans) == 3 else tuple(f"{start}:{end}" for start, end in case.spans)
    return path, AutoModelForCausalLM.from_pretrained(path), spans


@pytest.mark.parametrize("label", OVER_NODES)
def test_same_text(label: str, tmp_path: Path) -> None:
    path, whole, spans = make(label, tmp_path / "model")
    ids = torch.randint(10, 250, (2, 17), generator=torch.Generator().manual_seed(4))
    with (
        run_swarm(path, spans) as swarm,
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
    ):
        expected = whole.generate(ids, max_new_tokens=8, **OPTIONS)
        assert torch.equal(model.generate(ids, max_new_tokens=8, **OPTIONS), expected)
        with model.session(max_length=64):
            assert torch.equal(model.generate(ids, max_new_tokens=8, **OPTIONS), expected)
            # another end than what the session has: it goes back, which nodes with recurrent states can't
            changed = torch.cat([expected[:, :20], torch.full((2, 2), 77)], 1)
            again = model.generate(changed, max_new_tokens=6, **OPTIONS)
            assert torch.equal(again, whole.generate(changed, max_new_tokens=6, **OPTIONS))
        if label == "qwen3_next":
            dies_and_goes_on(swarm, model, whole, spans[-1])


def dies_and_goes_on(swarm: Swarm, model: Any, whole: Any, span: str) -> None:
    """The node that takes over gets the session played in as one prefill; the others' recurrent states stay."""
    ids = torch.randint(10, 250, (1, 17), generator=torch.Generator().manual_seed(4))
    killed: list[Any] = []
    swarm.add(span)
    with model.session(max_length=64) as session:

        def kill() -> None:
            assert session.cache.session is not None
            killed.append(session.cache.session.route[-1].peer_id)
            swarm.node_of(killed[0]).kill()

        made = model.generate(ids, max_new_tokens=12, stopping_criteria=[at_token(5, kill)], **OPTIONS)
        assert torch.equal(made, whole.generate(ids, max_new_tokens=12, **OPTIONS))
        assert killed
        assert model.last_route[-1].peer_id != killed[0]
