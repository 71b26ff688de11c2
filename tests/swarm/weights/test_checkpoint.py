from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.errors import ModelError
from swarm.model.open_checkpoint import open_checkpoint
from swarm.model.source import resolve
from swarm.weights import checkpoint as checkpoint_module
from swarm.weights.checkpoint import INDEX
from tests.models import tiny_model

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of a sharded model that may be changed."""
    return Path(shutil.copytree(tiny_model("llama-gqa", sharded=True), tmp_path / "model"))


def _shard_of(path: Path, name: str) -> Path:
    return path / json.loads((path / INDEX).read_text())["weight_map"][name]


def test_one_file_and_many_hold_the_same() -> None:
    one = open_checkpoint(resolve(str(tiny_model("llama-gqa"))))
    many = open_checkpoint(resolve(str(tiny_model("llama-gqa", sharded=True))))
    assert set(one.files) == set(many.files)
    assert len(set(many.files.values())) > 3
    for name in one.files:
        assert torch.equal(one.read(name), many.read(name, mapped=True))


def test_info_is_what_is_read() -> None:
    checkpoint = open_checkpoint(resolve(str(tiny_model("llama-gqa", dtype="bfloat16", sharded=True))))
    info = checkpoint.info(NAME)
    tensor = checkpoint.read(NAME)
    assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
    assert info.dtype is torch.bfloat16 is checkpoint.main_dtype()
    assert info.file.name == checkpoint.files[NAME]


def test_lazy_reads_when_indexed() -> None:
    checkpoint = open_checkpoint(resolve(str(tiny_model("llama-gqa"))))
    lazy = checkpoint.lazy(NAME)
    assert torch.equal(lazy[...], checkpoint.read(NAME))
    assert torch.equal(lazy[2:4], checkpoint.read(NAME)[2:4])


def test_tensors_outlive_their_file() -> None:
    checkpoint = open_checkpoint(resolve(str(tiny_model("llama-gqa"))))
    expected = load_file(tiny_model("llama-gqa") / "model.safetensors")[NAME]
    tensors = [checkpoint.read(NAME), checkpoint.read(NAME, mapped=True)]
    checkpoint.close()
    assert all(torch.equal(tensor, expected) for tensor in tensors)


def test_without_pread_it_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.safe_open

    def old(path: Path, framework: str) -> object:
        return real(path, framework=framework)

    monkeypatch.setattr(checkpoint_module, "safe_open", old)
    checkpoint = open_checkpoint(resolve(str(tiny_model("llama-gqa"))))
    assert checkpoint.read(NAME).shape == (128, 64)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = _shard_of(sharded, NAME)
    shard.unlink()
    checkpoint = open_checkpoint(resolve(str(sharded)))
    for use in (checkpoint.read, checkpoint.info, lambda name: checkpoint.fetch([name])):
        with pytest.raises(ModelError, match=f"{shard.name} is missing"):
            use(NAME)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("left", [0, 6, -100])
def test_truncated_shard_is_named(sharded: Path, mapped: bool, left: int) -> None:
    shard = _shard_of(sharded, NAME)
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(ModelError, match=f"can't read .*{shard.name}"):
        open_checkpoint(resolve(str(sharded))).read(NAME, mapped=mapped)


def test_truncated_single_file_is_named(tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model("llama-gqa"), tmp_path / "model"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"can't read .*model\.safetensors"):
        open_checkpoint(resolve(str(path)))


def test_index_that_lies(sharded: Path) -> None:
    shard = _shard_of(sharded, NAME)
    tensors = load_file(shard)
    tensors.pop(NAME)
    save_file(tensors, shard)
    checkpoint = open_checkpoint(resolve(str(sharded)))
    with pytest.raises(ModelError, match=NAME):
        checkpoint.read(NAME)
    with pytest.raises(ModelError, match=NAME):
        checkpoint.info(NAME)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": {"a": "../../etc/x.safetensors"}}', '{"weight_map": {"a": "/x.safetensors"}}',
     '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "pytorch_model.bin"}}'],
)  # fmt: skip
def test_bad_index(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        open_checkpoint(resolve(str(sharded)))
