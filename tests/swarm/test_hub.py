"""A model from the Hub, by way of a local server that speaks the calls used: only what the span needs is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys, torch
from swarm.skeleton import fetch_span, load_span
from swarm.source import resolve
source = resolve("some/model")
seen = []
fetch_span(source, 2, 4, progress=lambda *done: seen.append(done))
span = load_span(source, 2, 4, dtype=torch.float32, device="cpu")
total = sum(float(parameter.double().abs().sum()) for parameter in span.blocks.parameters())
print(json.dumps({"prefix": source.dht_prefix, "seen": seen, "total": total}))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the files of ``model`` as those of some/model."""

    model: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        owner, name, verb, revision, *rest = [*self.path.strip("/").split("/"), "", "", "", ""]
        file = self.model / "/".join(part for part in rest if part)
        if (
            (owner, name, verb) != ("some", "model", "resolve")
            or revision not in ("main", COMMIT)
            or not file.is_file()
        ):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        if body:
            self.asked.append(file.name)
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.model, Hub.asked = tiny_model("llama-gqa", sharded=True), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_only_the_shards_of_the_span_are_downloaded_and_once(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    index = json.loads((Hub.model / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".layers.2." in name or ".layers.3." in name}
    assert needed < set(index.values())
    assert {name for name in Hub.asked if name.endswith(".safetensors")} == needed
    assert len(Hub.asked) == len(set(Hub.asked)), "nothing is downloaded twice"
    assert runs[0]["prefix"] == "model-hf"
    assert runs[0]["seen"][-1] == [len(needed), len(needed)]
    assert runs[0]["total"] == runs[1]["total"]
