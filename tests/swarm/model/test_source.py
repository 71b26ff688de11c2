from __future__ import annotations

import inspect
import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from swarm.errors import ModelError, UsageError
from swarm.model.source import resolve
from swarm.weights.hub import one_file as hub
from swarm.wire.dht_prefix import default_dht_prefix
from tests.models import tiny_model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)


def test_local_directory(no_network: None) -> None:
    path = tiny_model("llama-gqa", dtype="bfloat16")
    source = resolve(str(path))
    assert source.is_local
    assert source.path == path.resolve()
    assert (source.num_blocks, source.hidden_size, source.vocab_size, source.max_positions) == (6, 64, 300, 512)
    assert source.dtype is torch.bfloat16
    assert source.model_type == "llama"


def test_sizes_of_families_with_other_names() -> None:
    bloom = resolve(str(tiny_model("bloom")))
    assert (bloom.num_blocks, bloom.hidden_size, bloom.max_positions) == (6, 64, 512)
    falcon = resolve(str(tiny_model("falcon-7b")))
    assert (falcon.num_blocks, falcon.hidden_size) == (6, 64)


def test_dtype_from_the_tensors_if_the_config_has_none(tmp_path: Path) -> None:
    original = tiny_model("llama-gqa", dtype="bfloat16")
    config = json.loads((original / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(original / "model.safetensors")
    assert resolve(str(tmp_path)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("model", "model_type", "prefix"),
    [
        ("meta-llama/Llama-2-70b-chat-hf", "llama", "Llama-2-70b-chat-hf"),
        ("huggyllama/llama-65b", "llama", "llama-65b-hf"),
        ("meta-llama/Llama-3.1-8B", "llama", "Llama-3-1-8B-hf"),
        ("tiiuae/falcon-180B", "falcon", "falcon-180B"),
        ("bigscience/bloom", "bloom", "bigscience/bloom-petals"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", "Mixtral-8x7B-v0-1"),
        ("my model v1.0", "mistral", "my-model-v1-0"),
    ],
)
def test_dht_prefix_is_that_of_petals(model: str, model_type: str, prefix: str) -> None:
    assert default_dht_prefix(model, model_type) == prefix


def test_dht_prefix_of_a_directory(tmp_path: Path) -> None:
    link = tmp_path / "my model.v2"
    link.mkdir()
    for file in tiny_model("falcon-7b").iterdir():
        (link / file.name).symlink_to(file)
    assert resolve(str(link)).dht_prefix == "my-model-v2"
    assert resolve(str(link), dht_prefix="own").dht_prefix == "own"
    with pytest.raises(UsageError, match="dots or spaces"):
        resolve(str(link), dht_prefix="a.b")


def _directory(path: Path, config: object = None, files: tuple[str, ...] = ()) -> str:
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file in files:
        (path / file).touch()
    return str(path)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (None, ("model.safetensors",), r"no config\.json in "),
        ({"model_type": "llama"}, (), "no weights in "),
        ({"model_type": "llama"}, ("pytorch_model.bin",), r"\.bin files only.*save_pretrained"),
        ({"model_type": "quux"}, ("model.safetensors",), "type 'quux', which this version of transformers"),
        ({"hidden_size": 4}, ("model.safetensors",), "no model_type"),
        ("{", ("model.safetensors",), "can't read .*config.json"),
        ({"model_type": "t5"}, ("model.safetensors",), "'t5', which is not a causal language model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}, ("model.safetensors",), "with aqlm"),
    ],
)
def test_unusable_directories(
    tmp_path: Path, no_network: None, config: object, files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve(_directory(tmp_path, config, files))
    assert "\n" not in str(caught.value)


def test_no_such_path(no_network: None) -> None:
    with pytest.raises(ModelError, match="no directory or GGUF file '/no/such'"):
        resolve("/no/such")


def _hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their constructors want an HTTP response of the library's present HTTP client
    error.args = ("gone",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "neither a directory here nor a repository on the Hub"),
        (LocalEntryNotFoundError, "not reachable"),
        (EntryNotFoundError, r"no config\.json in 'a/b'"),
        (ConnectionError, "can't get config.json"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise _hub_error(error)

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=message) as caught:
        resolve("a/b")
    assert "\n" not in str(caught.value)


def test_not_even_a_hub_id() -> None:
    with pytest.raises(ModelError, match="owner/name"):
        resolve("a/b/c")


def test_hub_model_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny_model("llama-gqa"))
    asked = []

    def download(repo: str, filename: str, *, revision: str | None, token: object, cache_dir: object) -> str:
        asked.append((repo, filename, revision))
        return str(snapshot / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    source = resolve("someone/tiny.model", revision="main", token="secret")
    assert asked == [("someone/tiny.model", "config.json", "main")]
    assert source.hub is not None
    assert source.hub.revision == "c0ffee"
    assert not source.is_local
    assert source.dht_prefix == "tiny-model-hf"
    assert "secret" not in repr(source)


@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_bundled_names(name: str, no_network: None) -> None:
    try:
        source = resolve(name)
    except ModelError:
        pytest.skip("not built into this checkout")
    assert source.is_local


def test_hub_library_is_called_as_it_is() -> None:
    """The fake above must not hide a changed signature."""
    parameters = inspect.signature(huggingface_hub.hf_hub_download).parameters
    assert {"repo_id", "filename", "revision", "token", "cache_dir"} <= set(parameters)
