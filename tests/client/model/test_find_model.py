"""What a client has of a model from the Hub once it has found it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from swarm.client.model.find_model import find_model
from swarm.model.source import resolve
from tests.swarm.weights.hub.hub_server import HubServer


def test_the_tokenizer_comes_along_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = resolve("demo").path
    with HubServer(demo) as server:
        server.stand_in(monkeypatch)
        source = find_model("some/model", [], cache_dir=tmp_path)
        assert not server.sent(), "no weights yet"
        names = [each.file for each in server.asked]
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(names)
        text = "def main() -> None:"
        assert AutoTokenizer.from_pretrained(source.path)(text) == AutoTokenizer.from_pretrained(demo)(text)
        server.asked.clear()
        find_model("some/model", [], cache_dir=tmp_path)
        assert not server.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("some/model", [], cache_dir=tmp_path).path == source.path
