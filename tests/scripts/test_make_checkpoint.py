"""Checkpoints of which only some blocks are made: these load, and the rest takes no room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.errors import ModelError
from swarm.model.loading import load_span
from swarm.model.source import resolve
from tests.models import make_checkpoint, make_config


@pytest.mark.parametrize("like", ["llama-gqa", "falcon-180b", "bloom", "mixtral"])
def test_some_blocks_only(like: str, tmp_path: Path) -> None:
    config = make_config(like, hidden=128, dtype="bfloat16")
    whole = make_checkpoint(tmp_path / "whole", config, max_shard_bytes=200_000)
    part = make_checkpoint(tmp_path / "part", config, max_shard_bytes=200_000, only=range(2, 4))
    made = {file.name: file.stat() for file in part.glob("*.safetensors")}
    everything = {file.name: file.stat() for file in whole.glob("*.safetensors")}
    assert 0 < len(made) < len(everything)
    assert {name: stat.st_size for name, stat in made.items()} == {name: everything[name].st_size for name in made}
    assert (part / "model.safetensors.index.json").read_text() == (whole / "model.safetensors.index.json").read_text()

    span = load_span(resolve(str(part)), 2, 4, dtype=torch.bfloat16, device="cpu")
    for parameter in span.blocks.parameters():
        assert 0 < parameter.float().std() < 1
    with pytest.raises(ModelError, match="is missing"):
        load_span(resolve(str(part)), 0, 1, dtype=torch.bfloat16, device="cpu")
