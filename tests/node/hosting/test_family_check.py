"""A node with versions that aren't tested checks the blocks of its model's family before it joins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm.compat import versions
from swarm.compat.versions import Versions, installed, set_name
from swarm.errors import ModelError
from swarm.model.family_check.verdicts import keep_verdict
from swarm.node.engine.attention import attention
from swarm.node.hosting.family_check import require_right_blocks
from swarm.node.output import JsonOutput
from tests.models import tiny_model
from tests.swarm_e2e.nodes import START_TIMEOUT

PATCH = """
import swarm.compat.versions as versions
versions.TESTED = (versions.Versions("1.0.0", "1.0.0"),)
"""


@pytest.fixture
def _untested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(versions, "TESTED", (Versions("1.0.0", "1.0.0"),))


@pytest.fixture
def output(_untested: None) -> JsonOutput:
    return JsonOutput.__new__(JsonOutput)  # without what it does to the logging of the process


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_next", "deepseek_v3", "falcon"])
def test_what_is_right_is_found_right(model_type: str, output: JsonOutput, capfd: pytest.CaptureFixture[str]) -> None:
    require_right_blocks(model_type, output)
    assert capfd.readouterr().out.count(f"checking a tiny {model_type} model") == 1


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_attention_that_is_scaled_otherwise_is_refused(
    model_type: str, output: JsonOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule: Any = attention._Rule
    monkeypatch.setattr(attention, "_Rule", lambda scaling, *rest: rule(scaling * 1.1, *rest))
    with pytest.raises(ModelError, match=f"blocks of {model_type} .*hidden states after the last block are off by"):
        require_right_blocks(model_type, output)


def test_blocks_that_are_called_otherwise_are_refused(output: JsonOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Any:
        raise TypeError("forward() got an unexpected keyword")

    monkeypatch.setattr("swarm.model.families.base.Family.run", run)
    with pytest.raises(ModelError, match=r"blocks of gemma2 .*TypeError: .*an unexpected keyword"):
        require_right_blocks("gemma2", output)


def _serve(cache: Path, folder: Path) -> subprocess.Popen[str]:
    (folder / "sitecustomize.py").write_text(PATCH)
    command = [Path(sys.executable).with_name("swarm-node"), "serve", tiny_model("llama-gqa"), "--log-format", "json"]
    environment = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--host", "127.0.0.1"], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def _said_until_ready(node: subprocess.Popen[str]) -> str:
    assert node.stdout is not None
    said = ""
    for line in node.stdout:
        said += line
        if '"ready"' in line:
            break
    node.terminate()
    node.communicate(timeout=START_TIMEOUT)
    return said


def test_a_node_says_so_once_and_refuses_what_is_known_wrong(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "site"
    folder.mkdir()
    once, again = (_said_until_ready(_serve(cache, folder)) for _ in range(2))
    assert '"ready"' in once
    assert once.count("isn't a tested combination: checking a tiny llama model") == 1
    assert '"ready"' in again
    assert "tested combination" not in again

    keep_verdict(cache / "swarm" / "checked.json", set_name(installed()), "blocks of llama", "llama-2: off by 3")
    refused = _serve(cache, folder)
    said, _ = refused.communicate(timeout=START_TIMEOUT)
    assert refused.returncode == 2
    assert "blocks of llama don't come out as in transformers: llama-2: off by 3" in said
    assert '"blocks"' not in said
