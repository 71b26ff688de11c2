"""What ``--device`` means on machines with few or many GPUs."""

from __future__ import annotations

import pytest
import torch

from swarm.errors import UsageError
from swarm.node.hosting.placement.hardware import choose_devices


def names(wanted: str) -> list[str]:
    return [str(device) for device in choose_devices(wanted)]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert names("auto") == names("cpu") == ["cpu"]
    for wanted in ("cuda", "cuda:0", "cuda:0,cuda:1", "mps", "gpu", "", "cpu,cpu"):
        with pytest.raises(UsageError, match="--device"):
            choose_devices(wanted)


def test_with_three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert names("auto") == names("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert names("cuda:1") == ["cuda:1"]
    assert names("cuda:2, cuda:0") == ["cuda:2", "cuda:0"]
    assert names("cpu") == ["cpu"]
    for wanted in ("cuda:3", "cuda:0,cuda:0", "cuda,cuda:1", "cuda:0,cpu", "cuda:0,"):
        with pytest.raises(UsageError, match="--device"):
            choose_devices(wanted)
