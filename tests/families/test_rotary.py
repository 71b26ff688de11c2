"""Rotary frequencies that hang on a sequence's length: what else is in the batch must not matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from swarm.model.families import family_of

ROPES = {
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rows_of_one_batch(rope_type: str) -> None:
    kind, rotary = {"longrope": (Phi3Config, Phi3RotaryEmbedding), "dynamic": (LlamaConfig, LlamaRotaryEmbedding)}[
        rope_type
    ]
    config = kind(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128 if rope_type == "longrope" else 32,
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]},
        pad_token_id=0,
    )
    base, hidden = SimpleNamespace(rotary_emb=rotary(config)), torch.zeros(1, 1, 64)
    rows = [torch.arange(0, 40)[None], torch.arange(5, 9)[None], torch.arange(60, 61)[None], torch.arange(3, 4)[None]]
    family = family_of(config.model_type)
    packed = family.position_embeddings(base, config, hidden, torch.cat(rows, dim=1))  # type: ignore[arg-type]
    for number, row in enumerate(rows):
        fresh = rotary(config)
        begin = sum(before.shape[1] for before in rows[:number])
        for mine, theirs in zip(packed, fresh(hidden, row), strict=True):
            torch.testing.assert_close(mine[:, begin : begin + row.shape[1]], theirs)
