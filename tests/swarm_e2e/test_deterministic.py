"""With nodes that are deterministic, logits are the same to the last bit alone and beside eight other clients."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.errors import MissingBlocksError
from tests.models import tiny_model
from tests.swarm_e2e.nodes import run_command, run_swarm


def logits_of(model: Any, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    result = model.generate(ids, max_new_tokens=tokens, output_logits=True, **options)
    return torch.stack(result.logits), result.sequences


def prompt(number: int) -> torch.Tensor:
    return torch.randint(10, 250, (1, 3 + 17 * number), generator=torch.Generator().manual_seed(number))


def test_logits_alone_and_in_company() -> None:
    path = tiny_model("llama-gqa")
    whole = AutoModelForCausalLM.from_pretrained(path)
    with run_swarm(path, ("0:3", "3:6"), "--deterministic") as swarm:
        options: dict[str, Any] = {"initial_peers": swarm.initial_peers, "deterministic": True}
        with (
            SwarmModelForCausalLM.from_pretrained(str(path), **options) as model,
            ThreadPoolExecutor(8) as pool,
        ):
            alone, ids = logits_of(model, prompt(6), 12)
            others = [pool.submit(logits_of, model, prompt(number), 24) for number in (0, 1, 2, 3, 4, 5, 7, 8)]
            for _ in range(2):
                assert torch.equal(logits_of(model, prompt(6), 12)[0], alone)
            for other in others:
                other.result()
        expected, right = logits_of(whole, prompt(6), 12)
        assert torch.equal(ids, right)
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)

        said = run_command(["swarm-node", "status", str(path), "--json", "--initial-peers", swarm.initial_peers[0]])
        status = json.loads(said.stdout)
        assert [node["deterministic"] for node in status["nodes"]] == [True, True]


def test_a_client_that_wants_it_says_which_blocks_lack_it() -> None:
    path = tiny_model("llama-gqa", layers=2)
    with run_swarm(path, ("0:1",), "--deterministic") as swarm:
        swarm.add("1:2")
        with (
            SwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=swarm.initial_peers, deterministic=True, wait_timeout=0.5
            ) as model,
            pytest.raises(
                MissingBlocksError, match=r"nobody serves blocks 1:2 of .* deterministically \(.*--deterministic"
            ),
        ):
            logits_of(model, prompt(1), 2)
