from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swarm.errors import ModelError
from swarm.weights.sharing import manifest as manifest_module
from swarm.weights.sharing.manifest import PIECE_BYTES, Manifest, make_manifest, manifest_of
from swarm.weights.sharing.merkle import is_proven, leaf_hash, proof_of, root_of
from tests.models import tiny_model

pieces = st.lists(st.binary(max_size=4), min_size=1, max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(pieces, st.data())
def test_every_piece_is_proven_and_only_in_its_place(data: list[bytes], draw: st.DataObject) -> None:
    leaves = [leaf_hash(piece) for piece in data]
    root, index = root_of(leaves), draw.draw(st.integers(0, len(leaves) - 1))
    proof = proof_of(leaves, index)
    assert is_proven(leaves[index], index, len(leaves), proof, root)
    assert len(proof) <= (len(leaves) - 1).bit_length()
    other = draw.draw(st.integers(-2, len(leaves) + 1))
    if not 0 <= other < len(leaves) or leaves[other] != leaves[index]:
        assert not is_proven(leaves[index], other, len(leaves), proof, root)
    assert not is_proven(leaf_hash(b"another"), index, len(leaves), proof, root)


@given(pieces, st.binary(max_size=70), st.integers(-3, 50), st.integers(-3, 50), st.lists(st.binary(max_size=33)))
def test_no_proof_is_made_up(data: list[bytes], leaf: bytes, index: int, count: int, proof: list[bytes]) -> None:
    leaves = [leaf_hash(piece) for piece in data]
    if leaf not in leaves:
        assert not is_proven(leaf, index, count, proof, root_of(leaves))


@given(pieces, pieces)
def test_roots_differ_where_pieces_do(first: list[bytes], second: list[bytes]) -> None:
    roots = [root_of([leaf_hash(piece) for piece in data]) for data in (first, second)]
    assert (roots[0] == roots[1]) == (first == second)


def test_the_tree_is_that_of_rfc_6962() -> None:
    """Its published test vectors: the tree over these eight inputs."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    leaves = [leaf_hash(bytes.fromhex(each)) for each in inputs]
    assert root_of([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert root_of(leaves[:1]).hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert root_of(leaves).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = Path(shutil.copytree(tiny_model("llama-gqa", sharded=True), tmp_path / "model"))
    save_file({"large": torch.randn(700_000)}, path / "z.safetensors")
    return path


def test_every_tensor_is_where_the_manifest_says(model: Path) -> None:
    manifest = make_manifest(model)
    everything = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert [tensor.name for tensor in manifest.tensors] == sorted(everything)
    files = {file.name: file for file in manifest.files}
    assert {name for name, file in files.items() if file.is_small} >= {"config.json", "model.safetensors.index.json"}
    for tensor in manifest.tensors:
        data = (model / tensor.file).read_bytes()
        assert data[tensor.start : tensor.stop] == everything[tensor.name].numpy().tobytes()
        assert tensor.shape == tuple(everything[tensor.name].shape)
        for index in tensor.pieces:
            assert files[tensor.file].has_piece(index, data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
    large = files["z.safetensors"]
    data = (model / "z.safetensors").read_bytes()
    assert len(large.pieces) == 3
    assert large.sha256 == hashlib.sha256(data).hexdigest()
    assert not large.has_piece(1, data[:PIECE_BYTES])
    assert not large.has_piece(3, b"")


def test_the_root_is_of_everything(model: Path) -> None:
    manifest = make_manifest(model)
    sent = json.loads(json.dumps(manifest.to_json()))
    again = Manifest.from_json(sent)
    assert again == manifest
    assert again.root == manifest.root == make_manifest(model).root
    changes: list[tuple[str, str, Any]] = [
        ("files", "sha256", "00" * 32),
        ("files", "pieces", "00" * 32),
        ("tensors", "start", 0),
        ("tensors", "shape", [1]),
        ("tensors", "dtype", "F64"),
        ("tensors", "name", ""),
    ]
    for kind, field, value in changes:
        changed = copy.deepcopy(sent)
        changed[kind][0][field] = value
        assert Manifest.from_json(changed).root != manifest.root


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("files", "name", "../x.safetensors"),
        ("files", "name", "x.bin"),
        ("files", "name", "modeling.py"),
        ("files", "name", "..\\x.safetensors"),
        ("files", "name", "x\n.safetensors"),
        ("files", "size", -1),
        ("files", "size", 1 << 40),
        ("files", "pieces", "00"),
        ("files", "sha256", "zz"),
        ("tensors", "file", "x"),
        ("tensors", "stop", 1 << 40),
        ("tensors", "start", True),
        ("tensors", "shape", [-1]),
        ("tensors", "name", "zzz"),
    ],
)
def test_manifests_of_strangers(model: Path, kind: str, field: str, value: Any) -> None:
    sent = make_manifest(model).to_json()
    sent[kind][0][field] = value
    with pytest.raises(ValueError):
        Manifest.from_json(sent)


@given(JSON)
def test_anything_else_is_no_manifest(found: Any) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(found)


def test_it_is_made_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = manifest_of(model, tmp_path / "cache")
    real = make_manifest
    made: list[Path] = []
    monkeypatch.setattr(manifest_module, "make_manifest", lambda path, progress: (made.append(path), real(path))[1])
    assert manifest_of(model, tmp_path / "cache") == first
    assert not made
    save_file({"large": torch.zeros(700_001)}, model / "z.safetensors")
    assert manifest_of(model, tmp_path / "cache").root != first.root
    assert made


def test_what_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        make_manifest(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="can't read"):
        make_manifest(tmp_path)
