"""Latent attention keeps one latent of a token, and keeps it once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.model.empty_span import block_caches
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.probe import KVGeometry
from swarm.model.source import resolve
from swarm.node.engine.engine import Engine
from tests.models import make_checkpoint


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_what_is_kept(model_type: str, tmp_path: Path) -> None:
    config = next(case for case in CASES if case.model_type == model_type).config()
    source = resolve(str(make_checkpoint(tmp_path, config)))
    span = load_span(source, 1, 3, dtype=torch.float32, device="cpu")
    size = config.kv_lora_rank + config.qk_rope_head_dim
    assert span.kv == (KVGeometry(1, size, size, shared=True),) * 2
    cache = Engine(span, cache_tokens=64)._cache
    assert all(cache.values[block] is cache.keys[block] for block in (1, 2))
    assert cache.nbytes == 2 * 64 * size * 4
    caches = block_caches(source, torch.float32)
    assert [each.bytes(tokens=10, rows=7, itemsize=4) for each in caches] == [10 * size * 4] * 5


def test_what_hybrids_keep(tmp_path: Path) -> None:
    config = next(case for case in CASES if case.model_type == "qwen3_next").config()
    source = resolve(str(make_checkpoint(tmp_path, config)))
    states = 4 * (4 * 80 + 4 * 8 * 12)  # see tests/node/engine/cache/test_states.py
    caches = block_caches(source, torch.float32)
    assert [each.bytes(tokens=0, rows=3, itemsize=4) for each in caches] == [3 * states] * 3 + [0, 3 * states]
    assert caches[3].bytes(tokens=1000, rows=3, itemsize=4) == 1000 * 2 * (16 + 16) * 4
