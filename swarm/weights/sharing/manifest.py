"""What a model's weights are, to the byte: every tensor's place, and hashes by which any piece can be checked.

A manifest's :attr:`~Manifest.root` names the model: who has it can check a manifest that a stranger sends, and with
that each piece of a file, whoever it comes from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ...errors import ModelError
from ..partial import write_json
from ..safetensors_header import read_ranges
from .merkle import HASH_BYTES, leaf_hash, root_of

PIECE_BYTES = 1 << 20
SMALL_FILES = frozenset(
    (
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
        *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    )
)
"""What else of a checkpoint belongs to it. None of them is code, and nothing else is ever taken from a stranger."""
MAX_SMALL_BYTES = 64 << 20
_MAX_FILES = 10_000
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.safetensors")
_VERSION = 2


@dataclass(frozen=True)
class ManifestFile:
    """A safetensors file, or one of :data:`SMALL_FILES`.

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

    @property
    def is_small(self) -> bool:
        """Whether it is one of those that everybody needs, and needs whole."""
        return self.name in SMALL_FILES

    def piece_range(self, index: int) -> tuple[int, int]:
        """The bytes ``(start, stop)`` of piece ``index``."""
        return index * PIECE_BYTES, min((index + 1) * PIECE_BYTES, self.size)

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
            if len(found["files"]) > _MAX_FILES:
                raise ValueError("not a manifest: too many files")
            files = tuple(_file(each) for each in found["files"])
            sizes = {file.name: file.size for file in files}
            tensors = tuple(_tensor(each, sizes) for each in found["tensors"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a manifest: {type(error).__name__} {error}") from error
        for names in ([file.name for file in files], [tensor.name for tensor in tensors]):
            if names != sorted(set(names)):
                raise ValueError("not a manifest: its names are not in order, or not unique")
        return cls(files, tensors)


def make_manifest(directory: Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Of a directory's safetensors files and :data:`SMALL_FILES`, each of which is read once.

    Args:
        progress: ``progress(bytes done, bytes of all)``.

    Raises:
        ModelError: there are no weights, or a file can't be read.
    """
    paths = _paths(directory)
    if not any(path.name.endswith(".safetensors") for path in paths):
        raise ModelError(f"no .safetensors files in {directory}")
    files, tensors = [], []
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        try:
            with path.open("rb") as file:
                size, whole, pieces = path.stat().st_size, hashlib.sha256(), []
                ranges = {} if path.name in SMALL_FILES else read_ranges(file, size)
                for name, place in ranges.items():
                    tensors.append(ManifestTensor(name, path.name, place.start, place.stop, place.dtype, place.shape))
                file.seek(0)
                while data := file.read(PIECE_BYTES):
                    whole.update(data)
                    pieces.append(leaf_hash(data))
                    done += len(data)
                    if progress is not None:
                        progress(done, total)
        except (OSError, ValueError) as error:
            raise ModelError(f"can't read {path}: {error}") from error
        files.append(ManifestFile(path.name, size, whole.hexdigest(), tuple(pieces)))
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError(f"several files in {directory} have a tensor of the same name")
    return Manifest(tuple(files), tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def manifest_of(
    directory: Path, cache: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """:func:`make_manifest`, made once: kept until a file's size or time changes.

    Args:
        cache: a folder; by default one in the Hub's home (``HF_HOME``).
    """
    kept = _kept(directory, cache)
    try:
        return Manifest.from_json(json.loads(kept.read_text()))
    except (OSError, ValueError):
        manifest = make_manifest(directory, progress)
    write_json(kept, manifest.to_json())
    return manifest


def keep_manifest(directory: Path, manifest: Manifest, cache: Path | None = None) -> None:
    """Spares :func:`manifest_of` the work, where each file of ``directory`` has been checked on its way in."""
    write_json(_kept(directory, cache), manifest.to_json())


def _kept(directory: Path, cache: Path | None) -> Path:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _paths(directory)]
    key = hashlib.sha256(json.dumps([_VERSION, str(directory.resolve()), files]).encode()).hexdigest()
    return (cache or Path(constants.HF_HOME) / "swarm-manifests") / f"{key}.json"


def _paths(directory: Path) -> list[Path]:
    small = (directory / name for name in SMALL_FILES)
    return sorted([*directory.glob("*.safetensors"), *(path for path in small if path.is_file())])


def _file(found: Mapping[str, Any]) -> ManifestFile:
    name, size, digest = found["name"], _count(found["size"]), bytes.fromhex(found["sha256"])
    if not isinstance(name, str) or not (name in SMALL_FILES or _WEIGHTS.fullmatch(name)):
        raise ValueError(f"not a manifest: {str(name)[:80]!r} is not the name of a file that a checkpoint needs")
    if name in SMALL_FILES and size > MAX_SMALL_BYTES:
        raise ValueError(f"not a manifest: {name} is too large")
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
