"""Real nodes with quantized weights give the tokens that transformers gives with the same weights, dequantized."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.node.engine.blocks.quantization import find_scheme
from tests.models import tiny_model
from tests.swarm_e2e.nodes import run_swarm, run_to_end

LAYERS = 4


def test_tokens_and_logits_are_those_of_the_dequantized_weights(tmp_path: Path) -> None:
    """All schemes, over engines without a network: tests/node/engine/blocks/quantization/test_quantization.py."""
    path = tiny_model("llama-gqa", layers=LAYERS)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    scheme = find_scheme("nf4", torch.device("cpu"), torch.float32)
    for module in whole.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = scheme.make(module.weight.data).dequantize(torch.float32)
    ids = torch.randint(10, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with (
        run_swarm(path, (f"0:{LAYERS}",), "--quantization", "nf4") as swarm,
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
    ):
        assert model.generate(ids, **options).tolist() == whole.generate(ids, **options).tolist()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-3, rtol=1e-3)
        _, (status,), _ = run_to_end(
            ["status", str(path), "--json", "--initial-peers", swarm.initial_peers[0]], tmp_path
        )
        assert [node["quantization"] for node in status["nodes"]] == ["nf4"]
