"""How many of a model's blocks fit, from the model itself and the memory that is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.errors import UsageError
from swarm.model.model_source import ModelSource
from swarm.node.hosting.placement import plan as planning
from swarm.node.hosting.placement.memory import Plan
from swarm.node.settings import NodeSettings
from tests.models import make_config

CPU = torch.device("cpu")


def plan(
    monkeypatch: pytest.MonkeyPatch, free: int, *devices: torch.device, adapter_bytes: int = 0, **asked: object
) -> Plan:
    """Of a model of four blocks, with ``free`` bytes on each device."""
    monkeypatch.setattr(planning, "free_memory", lambda _: free)
    source = ModelSource("m", Path(), make_config("llama-gqa", layers=4), "m", torch.float32)
    settings = NodeSettings("m", **asked)  # type: ignore[arg-type]
    return planning.plan_blocks(settings, source, torch.float32, devices or [CPU], adapter_bytes)[0]


def test_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"quantization": "none", "cache_tokens": 64}
    whole = plan(monkeypatch, 1 << 30, **room)
    assert (whole.num_blocks, whole.quantization, whole.cache_tokens) == (4, "none", 64)
    each = whole.bytes_each
    counts = [plan(monkeypatch, int(count * each / 0.85) + 1000, **room).num_blocks for count in range(1, 6)]
    assert counts == [1, 2, 3, 4, 4]
    assert plan(monkeypatch, int(2 * each / 0.85) + 1000, CPU, CPU, **room).num_blocks == 3  # less than one is lost
    more = plan(monkeypatch, 1 << 30, adapter_bytes=each, **room)
    assert more.bytes_each == 2 * each
    with pytest.raises(UsageError, match="one block needs"):
        plan(monkeypatch, each // 2, **room)


def test_packed_weights_of_a_checkpoint_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no weights of this checkpoint can stay packed here"):
        plan(monkeypatch, 1 << 30, quantization="packed")
