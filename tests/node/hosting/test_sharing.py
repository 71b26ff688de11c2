from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from swarm.model.source import resolve
from swarm.node.hosting.weights.find import make_whole, whole_here
from swarm.node.settings import NodeSettings
from swarm.weights.sharing.manifest import make_manifest
from tests.models import tiny_model
from tests.swarm.weights.hub.hub_server import HubServer


def test_a_hub_model_is_made_whole_before_it_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Path(shutil.copytree(tiny_model("llama-gqa", sharded=True), tmp_path / "files"))
    (files / "tokenizer.json").write_text("{}")
    (files / "modeling.py").write_text("raise SystemExit")
    with HubServer(files) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        wanted = NodeSettings("some/model", weights="auto", cache_dir=tmp_path / "cache")
        assert whole_here(wanted) is None
        source = resolve("some/model", cache_dir=tmp_path / "cache")
        assert whole_here(wanted) is None, "the config alone"
        make_whole(source, weights=True)
        found = whole_here(wanted)
        assert found is not None
        assert found.path == source.path
    assert make_manifest(source.path).root == make_manifest(files).root
    assert "tokenizer.json" in {file.name for file in make_manifest(source.path).files}
