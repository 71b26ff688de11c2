"""The tensors of a model on disk: which there are, in which safetensors file, and reading them one at a time."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..compute.memory import trim
from ..errors import ModelError
from .dequantize import Format, Header, Headers, PackedTensor, Parts, find_packed
from .hub.downloads import download
from .hub.one_file import HubRepo, NoSuchFileError
from .hub.remote_file import HubFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LARGE = 1 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is indexed with ``[...]``, the one operation that transformers' loader uses."""

    checkpoint: Checkpoint
    name: str
    mapped: bool

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.checkpoint.read(self.name, mapped=self.mapped)
        return tensor if index is Ellipsis else tensor[index]


class Checkpoint:
    """The tensors of one model.

    Attributes:
        files: file name by tensor name.
        listing: the file that says which tensors there are (for error messages).
    """

    def __init__(self, directory: Path, hub: HubRepo | None, files: Mapping[str, str], listing: Path) -> None:
        self.files = dict(files)
        self.listing = listing
        self._directory = directory
        self._hub = hub
        self._packed: Mapping[str, PackedTensor] = {}
        self._dtype = torch.float32  # of weights that are computed
        self._computing = threading.Lock()  # one at a time, as each needs memory for the while
        self._remote: dict[str, HubFile] = {}
        self._here: set[str] = set()  # tensors of a Hub model that have been downloaded
        self._handles: dict[tuple[str, bool], Any] = {}
        self._lock = threading.Lock()  # transformers' loader reads from several threads

    def compute_weights(self, formats: Sequence[Format], dtype: torch.dtype) -> None:
        """Takes the tensors that ``formats`` know for parts of weights, which are then there too, in ``dtype``."""
        self._dtype = dtype
        self._packed = find_packed(self.files, formats)
        self.files |= {name: self.files[packed.parts[packed.format.main]] for name, packed in self._packed.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def fetch(self, names: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Download what is missing of ``names``, several files at a time. ``progress(bytes done, bytes to download)``.

        Raises:
            ModelError: a file is missing, or the Hub can't be reached.
        """
        by_file: dict[str, list[str]] = {}
        names = [stored for name in names for stored in self.stored(name)]
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        if self._hub is None:
            for file in by_file:
                self._locate(file)
        else:
            with self._lock:
                remote = {file: self._remote_file(file) for file in by_file}
            download([(remote[file], wanted) for file, wanted in by_file.items()], progress or (lambda *_: None))
            self._here.update(names)

    def info(self, name: str) -> TensorInfo:
        """File, shape and dtype of a tensor, from its file's header (of a quantized one: of its numbers).

        Raises:
            ModelError: the file is missing, cut short, or does not hold the tensor.
        """
        name = self.stored(name)[0]
        handle, path = self._handle(self.files[name], mapped=True)
        try:
            header = handle.get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"tensor {name} is missing from {path}, though {self.listing.name} lists it") from error
        dtype = header.get_dtype()
        if dtype not in DTYPES:
            raise ModelError(f"tensor {name} in {path} is of type {dtype}, which can't be read")
        return TensorInfo(path, tuple(header.get_shape()), DTYPES[dtype])

    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the tensors in the first file."""
        first = min(self.files.values())
        counts = Counter(self.info(name).dtype for name, file in self.files.items() if file == first)
        return counts.most_common(1)[0][0]

    def read(self, name: str, *, mapped: bool = False) -> torch.Tensor:
        """The tensor, on the CPU, in the dtype it has in the file, or the model's if it is computed.

        Args:
            mapped: share the memory-mapped file (pages are read when touched, and are the system's to drop) instead
                of reading into memory of its own. A node reads: mapped pages of weights that it copies or converts
                would count twice.

        Raises:
            ModelError: the file is missing, cut short, or does not hold the tensor; or its parts don't fit together.
        """
        if (packed := self._packed.get(name)) is None:
            return self._read_stored(name, mapped=mapped)
        try:
            with self._computing:
                parts = {suffix: self._read_stored(part, mapped=mapped) for suffix, part in packed.parts.items()}
                weight = packed.format.unpack(parts).to(self._dtype).contiguous()
                parts.clear()
                if weight.numel() >= _LARGE:
                    trim()  # or what it took stays with this one of the loader's threads
                return weight
        except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:  # shapes that strangers chose
            reason = str(error).splitlines()[0]
            raise ModelError(f"can't compute {name} from its parts in {self.info(name).file}: {reason}") from error

    def packed(self, name: str) -> PackedTensor | None:
        """What a tensor is computed from; ``None``: it is stored as it is."""
        return self._packed.get(name)

    def headers(self, name: str) -> Headers:
        """The parts that a tensor is computed from, by suffix. Reads no data."""
        return {suffix: self._header(part) for suffix, part in self._packed[name].parts.items()}

    def read_parts(self, name: str) -> Parts:
        """The same, read.

        Raises:
            ModelError: as for :meth:`read`.
        """
        return {suffix: self._read_stored(part, mapped=False) for suffix, part in self._packed[name].parts.items()}

    def _header(self, name: str) -> Header:
        info = self.info(name)
        return Header(info.shape, info.dtype)

    def stored(self, name: str) -> tuple[str, ...]:
        """The names in the file of what makes the tensor."""
        packed = self._packed.get(name)
        return (name,) if packed is None else tuple(packed.parts.values())

    def _read_stored(self, name: str, *, mapped: bool) -> torch.Tensor:
        if self._hub is not None and name not in self._here:
            self.fetch([name])  # or holes of a file that is here in part would be read as zeros
        handle, path = self._handle(self.files[name], mapped=mapped)
        try:
            return handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"can't read tensor {name} from {path}: {error}") from error

    def lazy(self, name: str, *, mapped: bool = False) -> LazyTensor:
        """The tensor, to be read later."""
        return LazyTensor(self, name, mapped)

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid, mapped ones too."""
        with self._lock:
            self._handles.clear()

    def _locate(self, file: str) -> Path:
        path = self._directory / file
        if self._hub is None:
            if not path.is_file():
                raise ModelError(f"{path} is missing, though {self.listing.name} lists it: copy or download it again")
            return path
        remote = self._remote_file(file)
        try:
            remote.ranges()
        except NoSuchFileError:
            raise ModelError(f"{file} is missing from {self._hub.name!r} on the Hub, though {INDEX} lists it") from None
        found = remote.path()
        if found is None:
            raise ModelError(f"{file} of {self._hub.name!r} is gone from the cache: start again")
        return found

    def _remote_file(self, file: str) -> HubFile:
        assert self._hub is not None
        return self._remote.setdefault(file, HubFile(self._hub, self._directory, file))

    def _handle(self, file: str, *, mapped: bool) -> tuple[Any, Path]:
        with self._lock:
            path = self._locate(file) if (file, mapped) not in self._handles else None
            if path is not None:
                try:
                    handle = _open(path, mapped=mapped)
                except ModelError:
                    if path.exists():
                        raise
                    path = self._locate(file)  # a part, which another process has just made whole
                    handle = _open(path, mapped=mapped)
                self._handles[file, mapped] = (handle, path)
            return self._handles[file, mapped]


def open_files(directory: Path, hub: HubRepo | None) -> Checkpoint:
    """The safetensors files of ``directory``, or of a model on the Hub whose files go there.

    Raises:
        ModelError: there are none, or an index or header can't be read.
    """
    if hub is not None:
        remote = HubFile(hub, directory, SINGLE)
        # What is here first: without a network, the Hub can't be asked whether there is an index.
        if remote.path() is None and (index := hub.fetch(INDEX)) is not None:
            return Checkpoint(directory, hub, _read_index(index), index)
        try:
            return Checkpoint(directory, hub, dict.fromkeys(remote.ranges(), SINGLE), directory / SINGLE)
        except NoSuchFileError:
            has_bin = any(hub.has(name) for name in ("pytorch_model.bin.index.json", "pytorch_model.bin"))
            raise ModelError(_no_weights(hub.name, has_bin=has_bin)) from None
    require_safetensors(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():  # before the index, as transformers does: an index may be left over
        return Checkpoint(directory, None, _read_headers([single]), single)
    if index.is_file():
        return Checkpoint(directory, None, _read_index(index), index)
    return Checkpoint(directory, None, _read_headers(sorted(directory.glob("*.safetensors"))), directory)


def require_safetensors(directory: Path) -> None:
    """Check that a local directory has weights that can be read.

    Raises:
        ModelError: it has none, or only pickled ones.
    """
    if (directory / INDEX).is_file() or any(directory.glob("*.safetensors")):
        return
    raise ModelError(_no_weights(str(directory), has_bin=any(directory.glob("*.bin"))))


def _no_weights(where: str, *, has_bin: bool) -> str:
    if has_bin:
        return (
            f"{where} has its weights as .bin files only, which are never opened (they can run code): convert them "
            f"with AutoModelForCausalLM.from_pretrained({where!r}).save_pretrained(NEW_DIRECTORY) and use that"
        )
    return f"no weights in {where}: there should be {SINGLE}, or {INDEX} with its shards"


def _open(path: Path, *, mapped: bool) -> Any:
    try:
        if not mapped:
            try:
                return safe_open(path, framework="pt", backend="pread")
            except TypeError:  # safetensors before 0.8 always maps
                pass
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"can't read {path}: {error}; if it was cut short, copy or download it again") from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # The index comes from strangers: a name must not lead out of the model's directory.
        safe = all(
            isinstance(file, str) and not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts
            for file in files.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"can't read {index}: {type(error).__name__} {error}") from error
    if not safe or not all(file.endswith(".safetensors") for file in files.values()):
        raise ModelError(f"{index} names files that are not safetensors files of this model")
    return files


def _read_headers(paths: Iterable[Path]) -> dict[str, str]:
    return {name: path.name for path in paths for name in _open(path, mapped=True).keys()}  # noqa: SIM118
