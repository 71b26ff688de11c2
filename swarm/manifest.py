"""What a model's weights are, to the byte: every tensor's place, and hashes by which any piece can be checked.

A manifest's :attr:`~Manifest.root` names the model: who has it can check a manifest that a stranger sends, and with
that each piece of a file, whoever it comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants

from swarm.errors import ModelError
from swarm.merkle import HASH_BYTES, leaf_hash, root_of
from swarm.partial import write_json
from swarm.safetensors_header import read_ranges

PIECE_BYTES = 1 << 20
_VERSION = 1


@dataclass(frozen=True)
class ManifestFile:
    """One safetensors file.

    Attributes:
        size: in bytes.
        sha256: of the whole, in hex; the Hub's own hash of the file.
        pieces: the leaf hashes of its pieces of :data:`PIECE_BYTES`, the last one perhaps shorter.
    """

    name: str
    size: int
    sha256: str
    pieces: tuple[bytes, ...]

    @cached_property
    def root(self) -> bytes:
        return root_of(self.pieces)

    def has_piece(self, index: int, data: bytes) -> bool:
        """Whether ``data`` is piece ``index``."""
        return 0 <= index < len(self.pieces) and leaf_hash(data) == self.pieces[index]


@dataclass(frozen=True)
class ManifestTensor:
    """One tensor: bytes ``start:stop`` of ``file``. ``dtype`` is the name that safetensors has for it."""

    name: str
    file: str
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def pieces(self) -> range:
        """The pieces of the file that hold it."""
        return range(self.start // PIECE_BYTES, -(-self.stop // PIECE_BYTES))


@dataclass(frozen=True)
class Manifest:
    """Files and tensors, each sorted by name."""

    files: tuple[ManifestFile, ...]
    tensors: tuple[ManifestTensor, ...]

    @cached_property
    def root(self) -> str:
        """64 hex digits that name exactly these weights: the hash of everything in here but single pieces' hashes, for
        which their file's Merkle root stands."""
        files = [[file.name, file.size, file.sha256, file.root.hex()] for file in self.files]
        tensors = [list(asdict(tensor).values()) for tensor in self.tensors]
        text = json.dumps([_VERSION, PIECE_BYTES, files, tensors], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        files = [{**asdict(file), "pieces": b"".join(file.pieces).hex()} for file in self.files]
        return {"version": _VERSION, "files": files, "tensors": [asdict(tensor) for tensor in self.tensors]}

    @classmethod
    def from_json(cls, found: Any) -> Manifest:
        """A manifest that came from somewhere. That it is the right one only its ``root`` says.

        Raises:
            ValueError: it is not one, names files outside the model's directory, or places outside its files.
        """
        try:
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']} of manifests is not known")
            files = tuple(_file(each) for each in found["files"])
            sizes = {file.name: file.size for file in files}
            tensors = tuple(_tensor(each, sizes) for each in found["tensors"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a manifest: {type(error).__name__} {error}") from error
        for names in ([file.name for file in files], [tensor.name for tensor in tensors]):
            if names != sorted(set(names)):
                raise ValueError("not a manifest: its names are not in order, or not unique")
        return cls(files, tensors)


def make_manifest(directory: Path) -> Manifest:
    """Of the safetensors files in a directory, each of which is read once.

    Raises:
        ModelError: there are none, or one can't be read.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"no .safetensors files in {directory}")
    files, tensors = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                size, whole, pieces = path.stat().st_size, hashlib.sha256(), []
                for name, place in read_ranges(file, size).items():
                    tensors.append(ManifestTensor(name, path.name, place.start, place.stop, place.dtype, place.shape))
                file.seek(0)
                while data := file.read(PIECE_BYTES):
                    whole.update(data)
                    pieces.append(leaf_hash(data))
        except (OSError, ValueError) as error:
            raise ModelError(f"can't read {path}: {error}") from error
        files.append(ManifestFile(path.name, size, whole.hexdigest(), tuple(pieces)))
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError(f"several files in {directory} have a tensor of the same name")
    return Manifest(tuple(files), tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def manifest_of(directory: Path, cache: Path | None = None) -> Manifest:
    """:func:`make_manifest`, made once: kept until a file's size or time changes.

    Args:
        cache: a folder; by default one in the Hub's home (``HF_HOME``).
    """
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.glob("*.safetensors"))
    ]
    key = hashlib.sha256(json.dumps([_VERSION, str(directory.resolve()), files]).encode()).hexdigest()
    kept = (cache or Path(constants.HF_HOME) / "swarm-manifests") / f"{key}.json"
    try:
        return Manifest.from_json(json.loads(kept.read_text()))
    except (OSError, ValueError):
        manifest = make_manifest(directory)
    write_json(kept, manifest.to_json())
    return manifest


def _file(found: Mapping[str, Any]) -> ManifestFile:
    name, size, digest = found["name"], _count(found["size"]), bytes.fromhex(found["sha256"])
    if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"not a manifest: {name!r} is not the name of a safetensors file")
    hashes = bytes.fromhex(found["pieces"])
    pieces = tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
    if len(digest) != HASH_BYTES or len(hashes) != HASH_BYTES * -(-size // PIECE_BYTES):
        raise ValueError(f"not a manifest: hashes of {name} are missing")
    return ManifestFile(name, size, digest.hex(), pieces)


def _tensor(found: Mapping[str, Any], sizes: Mapping[str, int]) -> ManifestTensor:
    name, start, stop = found["name"], _count(found["start"]), _count(found["stop"])
    if not isinstance(name, str) or not isinstance(found["dtype"], str):
        raise ValueError("not a manifest: a tensor without name or dtype")
    if not start <= stop <= sizes[found["file"]]:
        raise ValueError(f"not a manifest: {name} lies outside its file")
    return ManifestTensor(
        name, found["file"], start, stop, found["dtype"], tuple(_count(length) for length in found["shape"])
    )


def _count(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise ValueError(f"not a manifest: {found!r} where a size should be")
    return found
