"""A file of which some byte ranges are here, beside the Hub's cache and never under the name of a whole file.

In the folder of a repository in the Hub's cache, ``partial/ETAG`` is a sparse file of the full size and
``partial/ETAG.json`` lists the ranges that are in it. The list is written after the bytes have reached the disk, so a
machine that loses power has less than it could have and never what it does not have. ``partial/COMMIT/FILE.json`` says
which ETAG a file has, so that what is here can be used without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from ..ranges import Range, merge

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 2.0


class PartialFile:
    """One such file. Many may read; who writes holds :meth:`locked`.

    Attributes:
        path: of the sparse file.
        size: of the whole, in bytes.
    """

    def __init__(self, folder: Path, etag: str, size: int) -> None:
        self.path, self.size = folder / etag, size
        self._list = folder / f"{etag}.json"

    def present(self) -> list[Range]:
        """The ranges that are here."""
        try:
            if self.path.stat().st_size != self.size:
                return []
            return merge((int(start), int(stop)) for start, stop in json.loads(self._list.read_text())["ranges"])
        except (OSError, ValueError, KeyError, TypeError):
            return []  # not begun, or tampered with: begin anew

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process downloads a file; others wait, and then see what it got."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.path.with_name(f"{self.path.name}.lock")):
            yield

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """For filling in ranges. What was written counts from the next commit on; leaving commits."""
        present = self.present()
        # Not truncated first if there is no list: another process may have mapped what is there.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, self.size)
            writer = Writer(self, descriptor, present)
            try:
                yield writer
            finally:
                writer.commit()
        finally:
            os.close(descriptor)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()

    def become(self, blob: Path) -> None:
        """The whole file, under its own name."""
        blob.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, blob)
        self._list.unlink(missing_ok=True)

    def remove(self) -> None:
        self._list.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Writer:
    """Writes into a :class:`PartialFile`."""

    def __init__(self, partial: PartialFile, descriptor: int, present: list[Range]) -> None:
        self._partial, self._descriptor = partial, descriptor
        self._present, self._fresh = present, list[Range]()
        self._committed = time.monotonic()

    def write(self, offset: int, data: bytes) -> None:
        view, at = memoryview(data), offset
        while view:
            written = os.pwrite(self._descriptor, view, at)
            view, at = view[written:], at + written
        self._fresh = merge([*self._fresh, (offset, at)])
        fresh = sum(stop - start for start, stop in self._fresh)
        if fresh >= COMMIT_BYTES or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        if self._fresh:
            os.fsync(self._descriptor)
            self._present, self._fresh = merge([*self._present, *self._fresh]), []
            write_json(self._partial._list, {"size": self._partial.size, "ranges": self._present})
        self._committed = time.monotonic()


def write_json(path: Path, content: object) -> None:
    """Replaces ``path`` in one go, and for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
