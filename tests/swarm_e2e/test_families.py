"""Families that depart from the plain path, over real nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from tests.families.table import CASES, OVER_NODES
from tests.models import make_checkpoint
from tests.swarm_e2e.nodes import run_swarm

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("label", OVER_NODES)
def test_same_text(label: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.label == label)
    path = make_checkpoint(tmp_path / "model", case.config(), seed=case.seed)
    whole = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(10, 250, (2, 17), generator=torch.Generator().manual_seed(4))
    with (
        run_swarm(path, ("0:2", "1:4", "4:5")) as swarm,
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
