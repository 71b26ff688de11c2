"""Reading tensors from what peers have sent, which may be a part."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ...errors import ModelError
from ..checkpoint import DTYPES, Checkpoint
from ..dequantize import Header
from ..safetensors_header import read_ranges
from .store import WeightStore


class StoreCheckpoint(Checkpoint):
    """The tensors of a :class:`WeightStore`; those that are not here can't be read, rather than read as zeros."""

    def __init__(self, store: WeightStore) -> None:
        self._tensors = {tensor.name: tensor for tensor in store.manifest.tensors}
        files = {name: tensor.file for name, tensor in self._tensors.items()}
        super().__init__(store.directory, None, files, store.directory)
        self._store = store
        self._checked: set[str] = set()

    def fetch(self, names: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Checks that ``names`` are here.

        Raises:
            ModelError: one is not, or lies elsewhere than the manifest says.
        """
        stored = [part for name in names for part in self.stored(name)]
        missing = self._store.pieces_of(stored) & ~self._store.has
        if missing.any():
            raise ModelError(f"{int(missing.sum())} pieces of {self._store.directory} are missing: start again")
        for file in {self.files[name] for name in stored} - self._checked:
            self._check(file)
        self._here.update(stored)

    def main_dtype(self) -> torch.dtype:
        counts = Counter(tensor.dtype for tensor in self._store.manifest.tensors)
        return DTYPES.get(counts.most_common(1)[0][0], torch.float32)

    def _header(self, name: str) -> Header:
        tensor = self._tensors[name]  # the file need not be here yet
        return Header(tensor.shape, DTYPES.get(tensor.dtype, torch.uint8))

    def _check(self, file: str) -> None:
        """What to fetch for a tensor is what the manifest says; where it is read, the file says itself."""
        path = self._locate(file)
        try:
            try:
                opened = path.open("rb")
            except FileNotFoundError:
                opened = self._locate(file).open("rb")  # a part, which has just become a whole file
            with opened:
                size = os.fstat(opened.fileno()).st_size
                found = {name: (at.start, at.stop) for name, at in read_ranges(opened, size).items()}
        except (OSError, ValueError) as error:
            raise ModelError(f"can't read {path}: {error}") from error
        tensors = self._store.manifest.tensors
        if found != {tensor.name: (tensor.start, tensor.stop) for tensor in tensors if tensor.file == file}:
            raise ModelError(f"{file} is not what the manifest says: whoever made the manifest is not to be trusted")
        self._checked.add(file)

    def _read_stored(self, name: str, *, mapped: bool) -> torch.Tensor:
        if name not in self._here:
            self.fetch([name])
        return super()._read_stored(name, mapped=mapped)

    def _locate(self, file: str) -> Path:
        return self._store.locate(file)
