"""A model from the Hub, by way of a local server: the bytes that are needed, once, whatever goes wrong on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir
from safetensors.torch import load_file, save_file

from swarm.errors import ModelError
from swarm.model.load_ends import load_ends
from swarm.model.loading import load_span
from swarm.model.model_source import ModelSource
from swarm.model.open_checkpoint import open_checkpoint
from swarm.model.source import resolve
from swarm.model.tensors import fetch_span
from swarm.weights.byte_ranges import GAP
from swarm.weights.checkpoint import INDEX, SINGLE
from swarm.weights.hub import range_download
from tests.models import tiny_model
from tests.swarm.weights.hub.hub_server import COMMIT, TOKEN, HubServer, cut, fine, mislabeled, status

MIB = 1 << 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A model of eight tensors of 2 MiB each, t0 to t7."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text((tiny_model("llama-gqa") / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    save_file({f"t{n}": torch.randn(1 << 19, generator=generator) for n in range(8)}, files / SINGLE)
    monkeypatch.setattr(range_download, "FIRST_WAIT", 0.01)
    with HubServer(files) as server:
        yield server.stand_in(monkeypatch)


@pytest.fixture
def source(hub: HubServer, tmp_path: Path) -> ModelSource:
    return resolve("some/model", cache_dir=tmp_path / "cache")


@pytest.fixture
def expected(hub: HubServer) -> dict[str, torch.Tensor]:
    return load_file(hub.files / SINGLE)


def _blob(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT / SINGLE


def _read(source: ModelSource, expected: dict[str, torch.Tensor], *numbers: int) -> list[tuple[int, int]]:
    """Gets those tensors and compares them; returns the progress."""
    steps: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(source)
    names = [f"t{number}" for number in numbers]
    checkpoint.fetch(names, lambda *done: steps.append(done))
    for name in names:
        assert torch.equal(checkpoint.read(name), expected[name])
        assert torch.equal(checkpoint.read(name, mapped=True), expected[name])
    return steps


def test_a_span_costs_its_bytes(monkeypatch: pytest.MonkeyPatch, hub: HubServer, tmp_path: Path) -> None:
    sizes = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 512, "layers": 24, "vocab_size": 8000}
    path = tiny_model("llama-gqa", **sizes)
    hub.files = path
    source = resolve("some/model", cache_dir=tmp_path / "cache")
    steps: list[tuple[int, int]] = []
    fetch_span(source, 20, 24, progress=lambda *done: steps.append(done))
    span = load_span(source, 20, 24, dtype=torch.float32, device="cpu")
    local = load_span(resolve(str(path)), 20, 24, dtype=torch.float32, device="cpu")
    for ours, theirs in zip(span.blocks.parameters(), local.blocks.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert span.parameter_bytes <= hub.sent() <= span.parameter_bytes + 64 * 1024
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1] == pytest.approx(span.parameter_bytes, rel=0.02)
    before = hub.sent()
    fetch_span(source, 20, 24)
    assert hub.sent() == before
    ends = load_ends(source)
    assert torch.equal(ends.lm_head.weight, load_file(path / SINGLE)["lm_head.weight"])
    ends_bytes = sum(parameter.numel() * 4 for parameter in ends.parameters())
    assert hub.sent() - before <= ends_bytes + 2 * GAP


def test_a_part_is_not_under_the_name_of_the_whole(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _read(source, expected, 1)
    assert hub.sent() < 2.1 * MIB
    assert not _blob(tmp_path).exists()
    cached = scan_cache_dir(tmp_path / "cache")
    assert not cached.warnings
    assert [file.file_name for repo in cached.repos for revision in repo.revisions for file in revision.files] == [
        "config.json"
    ]


def test_a_tensor_that_is_not_here_is_never_read_as_zeros(
    source: ModelSource, expected: dict[str, torch.Tensor]
) -> None:
    _read(source, expected, 1)
    assert torch.equal(open_checkpoint(source).read("t5"), expected["t5"])


def test_parts_become_the_whole(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    early = open_checkpoint(source).read("t1", mapped=True)
    for numbers in ((0, 1, 2), (2, 3, 4), (5, 6)):
        _read(source, expected, *numbers)
    # All but one are 7/8 of the file: the rest comes along, so that its hash can be checked.
    assert _blob(tmp_path).read_bytes() == (hub.files / SINGLE).read_bytes()
    assert _blob(tmp_path).is_symlink()
    assert hub.sent() == (hub.files / SINGLE).stat().st_size
    assert not [file for file in (_blob(tmp_path).parents[2] / "partial").iterdir() if file.suffix == ""][1:]
    hub.asked.clear()
    _read(source, expected, *range(8))
    assert not hub.asked
    assert torch.equal(early, expected["t1"])


def test_most_of_a_file_is_all_of_it(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    steps = _read(source, expected, *range(7))
    assert _blob(tmp_path).exists()
    assert steps[-1] == ((hub.files / SINGLE).stat().st_size,) * 2
    assert len(steps) > 2, "whole files have progress too"


def test_a_whole_that_does_not_match_its_hash_is_removed(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _read(source, expected, 1)
    partial = next(file for file in (_blob(tmp_path).parents[2] / "partial").iterdir() if len(file.name) == 64)
    with partial.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"?")
    with pytest.raises(ModelError, match="SHA-256"):
        _read(source, expected, 0, 2, 3, 4, 5, 6)
    assert not _blob(tmp_path).exists()
    _read(source, expected, 1)


@pytest.mark.parametrize(
    "faults",
    [
        [cut(0)],
        [cut(700_000), cut(5), fine],
        [status(429, Retry_After="0"), status(503), status(500)],
        [status(429, RateLimit='"api";r=0;t=0'), status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
        [mislabeled(shift=1)],
        [mislabeled(short=100)],
        [mislabeled(grown=1)],
        [status(204)],
    ],
)
def test_what_goes_wrong_for_a_while(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], faults: list[Any]
) -> None:
    hub.faults = [fine, *faults]  # the first is the header
    _read(source, expected, 2, 3)
    assert not hub.faults
    assert hub.sent() < 4.1 * MIB, "what had arrived is not asked for again"


def test_a_server_that_never_gets_it_right_is_given_up(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor]
) -> None:
    hub.faults = [fine, *[status(503)] * range_download.TRIES]
    with pytest.raises(ModelError, match=r"can't get model\.safetensors .*503"):
        _read(source, expected, 2)
    _read(source, expected, 2)


def test_a_server_that_is_busy_from_the_start(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor]
) -> None:
    hub.busy = [503, 429]
    checkpoint = open_checkpoint(source)
    assert torch.equal(checkpoint.read("t2"), expected["t2"])
    assert not hub.busy


def test_a_busy_server_is_waited_for(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(range_download, "_sleep", lambda seconds, stopped: waits.append(seconds))
    hub.faults = [fine, status(429, Retry_After="17"), status(429, RateLimit='"api";r=0;t=23')]
    _read(source, expected, 2)
    assert waits == [17, 23]


@pytest.mark.parametrize("cdn", [False, True])
def test_a_server_without_ranges_sends_the_whole(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path, cdn: bool
) -> None:
    hub.ranges, hub.cdn = False, cdn
    _read(source, expected, 2)
    assert _blob(tmp_path).read_bytes() == (hub.files / SINGLE).read_bytes()


def test_the_token_is_the_hubs_alone(hub: HubServer, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    hub.gated = hub.cdn = True
    with pytest.raises(ModelError, match="terms"):
        resolve("some/model", cache_dir=tmp_path / "cache", token=False)
    source = resolve("some/model", cache_dir=tmp_path / "cache", token=TOKEN)
    _read(source, expected, 2)
    asked = [each for each in hub.asked if each.file == SINGLE]
    assert {(each.host, each.token) for each in asked} == {("hub", TOKEN), ("cdn", None)}
    assert hub.sent() < 2.1 * MIB


def test_a_file_that_changes_is_begun_anew(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor]
) -> None:
    _read(source, expected, 1)
    changed = {name: tensor + 1 for name, tensor in expected.items()}
    save_file(changed, hub.files / SINGLE)
    _read(source, changed, 2, 1)


def test_a_file_without_a_hash_is_fetched_whole(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.etag = "0123456789abcdef"
    _read(source, expected, 2)
    assert _blob(tmp_path).exists()


def test_nodes_that_share_a_cache(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    failures: list[BaseException] = []

    def run(*numbers: int) -> None:
        try:
            _read(source, expected, *numbers)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=numbers) for numbers in ((0, 1, 2), (1, 2, 3), (4, 5), (2, 3), (7,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hub.sent() == (hub.files / SINGLE).stat().st_size, "and nothing was downloaded twice"
    assert _blob(tmp_path).exists()


def test_a_file_that_has_just_become_whole_is_read(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Another process has all of it, and the Hub's library has not given it its name yet."""
    checkpoint = open_checkpoint(source)
    checkpoint.fetch(["t1"])
    whole, go_on = threading.Event(), threading.Event()
    hub.before_head = lambda: (whole.set(), go_on.wait(30))
    other = threading.Thread(target=_read, args=(source, expected, 0, 2, 3, 4, 5, 6))
    try:
        other.start()
        assert whole.wait(30)
        assert not _blob(tmp_path).exists()
        assert torch.equal(checkpoint.read("t1"), expected["t1"])
    finally:
        go_on.set()
        other.join()
    assert _blob(tmp_path).exists()


def test_without_a_network_what_is_here_is_used(
    hub: HubServer, source: ModelSource, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _read(source, expected, 1)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = resolve("some/model", cache_dir=source.hub.cache_dir)  # type: ignore[union-attr]
    _read(offline, expected, 1)
    with pytest.raises(ModelError, match="not reachable"):
        _read(offline, expected, 2)
    assert not hub.asked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 100, "impossible length"),
        (b"\x05", "impossible length"),
        (b"\x0a" + bytes(7) + b"[1,2,3,4] ", "header"),
        (b"\x02" + bytes(7) + b"{}" + b"more", "whole"),
        (b"\x3b" + bytes(7) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,400000]}}' + bytes(4), "whole"),
    ],
)
def test_files_that_are_not_safetensors(hub: HubServer, source: ModelSource, content: bytes, message: str) -> None:
    (hub.files / SINGLE).write_bytes(content)
    with pytest.raises(ModelError, match=rf"can't read model\.safetensors.*{message}"):
        open_checkpoint(source)


def test_a_full_disk_is_said_before(hub: HubServer, source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(source)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ModelError, match="make room"):
        checkpoint.fetch(["t1"])


def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, source: ModelSource) -> None:
    folder = source.path.parent.parent / "partial"
    folder.write_text("in the way")
    with pytest.raises(ModelError, match="make it writable"):
        open_checkpoint(source)


def test_a_missing_shard_is_named(hub: HubServer, source: ModelSource) -> None:
    (hub.files / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    checkpoint = open_checkpoint(source)
    for use in (checkpoint.read, checkpoint.info, lambda name: checkpoint.fetch([name])):
        with pytest.raises(ModelError, match=r"a\.safetensors is missing"):
            use("a")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin.index.json", r"\.bin files only.*from_pretrained\('some/model'\).save_pretrained"),
        ("pytorch_model.bin", r"\.bin files only.*from_pretrained\('some/model'\).save_pretrained"),
        ("x", "no weights in"),
    ],
)
def test_without_safetensors(hub: HubServer, source: ModelSource, file: str, message: str) -> None:
    (hub.files / SINGLE).unlink()
    (hub.files / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        open_checkpoint(source)
    assert not hub.sent(".bin"), "a pickle is not even downloaded"


PROGRAM = """
import hashlib, json
from swarm.weights import partial
from swarm.weights.hub.one_file import HubRepo
from swarm.weights.hub.remote_file import HubFile
partial.COMMIT_SECONDS = 0
config = HubRepo("some/model").fetch("config.json")
file = HubFile(HubRepo("some/model", config.parent.name), config.parent, "model.safetensors")
file.download(["t2", "t3"], lambda count: None, lambda: False)
place = file.ranges()["t3"]
with open(file.path(), "rb") as data:
    data.seek(place.start)
    print(hashlib.sha256(data.read(place.stop - place.start)).hexdigest())
"""


def _start(hub: HubServer, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_download_goes_on(hub: HubServer, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Also: the environment variables of the Hub's library are honoured."""
    stalled, go_on = threading.Event(), threading.Event()

    def stall(handler: Any, start: int, size: int, part: bytes) -> bool:
        handler.hub.asked[-1].sent = 3 * MIB
        content_range = f"bytes {start}-{start + len(part) - 1}/{size}"
        handler._send(206, {"Content-Range": content_range}, part[: 3 * MIB], length=len(part))
        stalled.set()
        go_on.wait(30)
        return True

    hub.faults = [fine, stall]
    process = _start(hub, tmp_path / "home")
    assert stalled.wait(60)
    list_file: Callable[[], list[Path]] = lambda: list((tmp_path / "home").rglob("partial/*.json"))  # noqa: E731
    end = time.monotonic() + 30
    while not list_file() or json.loads(list_file()[0].read_text())["ranges"][-1][1] < 6 * MIB:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go_on.set()
    again = _start(hub, tmp_path / "home")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert output.strip() == hashlib.sha256(expected["t3"].numpy().tobytes()).hexdigest()
    assert 4 * MIB < hub.sent() < 5.1 * MIB
