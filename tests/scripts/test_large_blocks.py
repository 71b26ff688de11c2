"""The script for blocks at their true size, on a toy: what nobody runs for weeks must not rot."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from swarm.errors import UsageError
from swarm.model.model_source import ModelSource
from swarm.network.peer import PeerOptions
from swarm.node.hosting.placement import plan as planning
from swarm.node.settings import NodeSettings
from tests.models import large_config

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("large_blocks")
    script.main(["--tiny", "mixtral-8x22b"])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert cells[:2] == ["mixtral-8x22b", "28"]
    assert cells[-1] == "1024, 1024, 1024"


def test_a_machine_that_is_too_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("large_blocks")
    monkeypatch.setattr(script, "free_memory", lambda _: 2 << 30)
    script.main(["llama-3.1-405b", "deepseek-v3:3"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == [
        "llama-3.1-405b, block 63: needs 12.9 GiB of memory, 2.0 are free",
        "deepseek-v3, block 3: needs 43.9 GiB of memory, 2.0 are free",
    ]


def test_the_plan_is_for_the_blocks_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's first blocks have no experts, and need a twentieth of the others' memory."""
    monkeypatch.setattr(planning, "free_memory", lambda _: 4 << 30)
    source = ModelSource("m", Path(), large_config("deepseek-v3", num_hidden_layers=4), "m", torch.bfloat16)
    source.config.first_k_dense_replace = 3

    def plan(blocks: str) -> None:
        settings = NodeSettings(model="m", peer=PeerOptions(), blocks=blocks)
        planning.plan_blocks(settings, source, torch.bfloat16, [torch.device("cpu")])

    plan("1:2")
    with pytest.raises(UsageError, match="one block needs"):
        plan("3:4")
