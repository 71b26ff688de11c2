"""A checkpoint on this disk of which some or all pieces are here: reading them for others, writing what arrives.

Whole files lie in the directory under their names, as any program expects them. The others are sparse files in its
folder ``.swarm`` (``weights/partial.py``), with the manifest beside them: a file gets its name once all its pieces are
here and checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import filelock
import numpy as np

from ...errors import ModelError
from ...ranges import Range
from ..partial import PartialFile, Writer, write_json
from .manifest import PIECE_BYTES, Manifest, ManifestFile
from .picker import Bits

_FOLDER = ".swarm"


class WeightStore:
    """Pieces are numbered through all files of the manifest, in order.

    Attributes:
        has: ``[pieces]``; those that are here.
        coming: those that are under way, for others to know.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.first = np.cumsum([0, *(len(file.pieces) for file in manifest.files)])
        self.num_pieces = int(self.first[-1])
        self._numbers = {file.name: number for number, file in enumerate(manifest.files)}
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._headers: dict[str, int] = {}  # where they end
        for tensor in manifest.tensors:
            self._headers[tensor.file] = min(self._headers.get(tensor.file, tensor.start), tensor.start)
        self._writers: dict[int, tuple[ExitStack, Writer]] = {}
        self._lock = filelock.FileLock(directory / _FOLDER / "lock", thread_local=False)
        self.has = np.zeros(self.num_pieces, np.bool_)
        self.coming = np.zeros(self.num_pieces, np.bool_)
        self.refresh()

    @classmethod
    def create(cls, directory: Path, manifest: Manifest) -> WeightStore:
        """A store to download into, or what an earlier run left of it.

        Raises:
            ModelError: the directory has something else in it, or can't be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            known = find_root(directory)
            if known not in (None, manifest.root) or (known is None and any(directory.iterdir())):
                raise ModelError(f"{directory} has other files in it: name an empty or a new directory")
            write_json(directory / _FOLDER / "manifest.json", {"root": manifest.root, **manifest.to_json()})
        except OSError as error:
            raise ModelError(f"can't write to {directory}: {error.strerror or error}") from error
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: Path) -> WeightStore | None:
        """What an earlier run left; None if there is nothing (of use)."""
        try:
            manifest = Manifest.from_json(json.loads((directory / _FOLDER / "manifest.json").read_text()))
        except (OSError, ValueError):
            return None
        return cls(directory, manifest) if find_root(directory) == manifest.root else None

    @property
    def is_whole(self) -> bool:
        return bool(self.has.all())

    def refresh(self) -> None:
        """Looks at the disk again: another process may have been at it."""
        for number, file in enumerate(self.manifest.files):
            bits = self.has[self.first[number] : self.first[number + 1]]
            bits[:] = False
            for start, stop in self._present(file):
                bits[-(-start // PIECE_BYTES) : len(bits) if stop == file.size else stop // PIECE_BYTES] = True

    def try_lock(self) -> bool:
        """Only one process downloads into a store. Whether that is this one now."""
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            return False
        return True

    def locate(self, name: str) -> Path:
        """Where the whole file or the part of it is."""
        path = self.directory / name
        return path if path.is_file() else self._partial(self.manifest.files[self._numbers[name]]).path

    def place(self, piece: int) -> tuple[int, int]:
        """The number of a piece's file, and the piece's own number in it."""
        number = int(np.searchsorted(self.first, piece, side="right")) - 1
        return number, int(piece - self.first[number])

    def size_of(self, pieces: Bits) -> int:
        """Bytes of these pieces together."""
        short = sum(
            len(file.pieces) * PIECE_BYTES - file.size
            for number, file in enumerate(self.manifest.files)
            if file.pieces and pieces[self.first[number + 1] - 1]
        )
        return int(np.count_nonzero(pieces)) * PIECE_BYTES - short

    def small_pieces(self) -> Bits:
        """The pieces of what everybody needs: config, tokenizer."""
        wanted = np.zeros(self.num_pieces, np.bool_)
        for number, file in enumerate(self.manifest.files):
            wanted[self.first[number] : self.first[number + 1]] = file.is_small
        return wanted

    def pieces_of(self, tensors: Iterable[str]) -> Bits:
        """The pieces that hold these tensors and the headers of their files.

        Raises:
            ModelError: there is no such tensor.
        """
        wanted = np.zeros(self.num_pieces, np.bool_)
        for name in tensors:
            if (found := self._tensors.get(name)) is None:
                raise ModelError(f"tensor {name} is not in the manifest: it is that of another model")
            first = int(self.first[self._numbers[found.file]])
            wanted[first + found.pieces.start : first + found.pieces.stop] = True
            wanted[first : first + -(-self._headers[found.file] // PIECE_BYTES)] = True
        return wanted

    def read(self, piece: int) -> bytes | None:
        """A piece, if it is here."""
        if not 0 <= piece < self.num_pieces or not self.has[piece]:
            return None
        number, index = self.place(piece)
        start, stop = self.manifest.files[number].piece_range(index)
        for _ in range(2):  # a part may have become a whole file between looking and opening
            try:
                with self.locate(self.manifest.files[number].name).open("rb") as file:
                    file.seek(start)
                    data = file.read(stop - start)
                    return data if len(data) == stop - start else None
            except OSError:
                continue
        return None

    def write(self, piece: int, data: bytes) -> bool:
        """Keeps a piece; False if ``data`` is not that piece. The caller has the lock (:meth:`try_lock`)."""
        number, index = self.place(piece)
        file = self.manifest.files[number]
        if not file.has_piece(index, data):
            return False
        if not self.has[piece]:
            self._writer(number).write(file.piece_range(index)[0], data)
            self.has[piece], self.coming[piece] = True, False
            if self.has[self.first[number] : self.first[number + 1]].all():
                self._finish(number)
        return True

    def finish(self) -> None:
        """Puts what has been written on the disk for good, and lets others download into the store."""
        self.coming[:] = False
        try:
            while self._writers:
                self._writers.popitem()[1][0].close()
            for number in range(len(self.manifest.files)):  # also empty ones, which have no pieces
                if self.has[self.first[number] : self.first[number + 1]].all():
                    self._finish(number)
        finally:
            self._lock.release()

    def _finish(self, number: int) -> None:
        file = self.manifest.files[number]
        if number in self._writers:
            self._writers.pop(number)[0].close()
        if not (self.directory / file.name).exists():
            if file.size == 0:
                (self.directory / file.name).touch()
            else:
                self._partial(file).become(self.directory / file.name)

    def _present(self, file: ManifestFile) -> list[Range]:
        path = self.directory / file.name
        if path.is_file():
            return [(0, file.size)] if path.stat().st_size == file.size else []
        return self._partial(file).present()

    def _partial(self, file: ManifestFile) -> PartialFile:
        # Under its number too: two small files may be the same.
        return PartialFile(self.directory / _FOLDER, f"{self._numbers[file.name]}-{file.sha256}", file.size)

    def _writer(self, number: int) -> Writer:
        if number not in self._writers:
            stack = ExitStack()
            self._writers[number] = (stack, stack.enter_context(self._partial(self.manifest.files[number]).writer()))
        return self._writers[number][1]


def find_root(directory: Path) -> str | None:
    """The root of the store in a directory; None if there is none."""
    try:
        found = json.loads((directory / _FOLDER / "manifest.json").read_text())["root"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
