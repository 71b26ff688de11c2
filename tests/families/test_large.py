"""The geometry of large models, on the meta device: what a block and a token in its cache take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.model.empty_span import block_caches
from swarm.model.model_source import ModelSource
from swarm.model.skeleton import build_skeleton
from swarm.node.engine.blocks.quantization import quantized_bytes
from tests.models import large_config

# parameters of a block, in millions, and KV bytes a token in bfloat16
LARGE = {
    "llama-2-70b": (856, 2 * 8 * 128 * 2),
    "llama-3.1-405b": (3188, 2 * 8 * 128 * 2),
    "falcon-180b": (2220, 2 * 8 * 64 * 2),  # transformers keeps a copy for each of the 232 query heads
    "bloom-176b": (2466, 2 * 112 * 128 * 2),
    "mixtral-8x22b": (2504, 2 * 8 * 128 * 2),
    "deepseek-v3": (11507, (512 + 64) * 2),  # its heads would take 128 · (192 + 128) · 2
}


@pytest.mark.parametrize("like", LARGE)
def test_a_block(like: str) -> None:
    parameters, kv_bytes = LARGE[like]
    source = ModelSource(like, Path(), large_config(like, num_hidden_layers=1), like, torch.bfloat16)
    block = build_skeleton(source, torch.bfloat16, attention="eager").layers[0]
    elements = sum(parameter.numel() for parameter in block.parameters())
    assert round(elements / 1e6) == parameters
    assert 2 * elements <= quantized_bytes(block, None) <= 2.001 * elements  # some versions have routers in float32
    assert [cache.bytes(tokens=1, rows=0, itemsize=2) for cache in block_caches(source, torch.bfloat16)] == [kv_bytes]
