"""A safetensors file on the Hub, of which as much is downloaded as is needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from ...errors import ModelError
from ...ranges import Range, subtract, total
from ..byte_ranges import DownloadPlan, plan_download
from ..partial import PartialFile, write_json
from ..safetensors_header import LENGTH_BYTES, TensorRange, data_start, read_ranges
from .one_file import HubRepo, NoSuchFileError
from .range_download import FileChanged, RangesNotServed, RemoteFile, download_range

T = TypeVar("T")
Report = Callable[[int], None]

FIRST_READ = 16 << 10
"""Bytes of a file that are asked for to learn where its header ends; most headers end before."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubFile:
    """One file of a repository whose revision is a commit.

    What verifies what: whole files come through the Hub's library, or are made of ranges and checked against the
    SHA-256 that is their ETag. Of ranges, the answers' ranges, lengths and ETags are checked and the header's
    consistency; that the bytes are the right ones rests on the connection (TLS), as there is no hash of a part.

    Args:
        snapshot: the commit's folder in the Hub's cache.
    """

    def __init__(self, repo: HubRepo, snapshot: Path, name: str) -> None:
        self.name = name
        self._repo, self._whole = repo, snapshot / name
        self._folder, self._blobs = snapshot.parent.parent / "partial", snapshot.parent.parent / "blobs"
        self._pointer = self._folder / snapshot.name / f"{name}.json"
        self._ranges: Mapping[str, TensorRange] | None = None

    def path(self) -> Path | None:
        """Of the file, or else of the sparse file with a part of it; None if neither is here."""
        if self._whole.exists():
            return self._whole
        if (partial := self._known_partial()) is not None:
            if partial.present():
                return partial.path
            if (blob := self._blob(partial)).exists():  # whole, though the Hub's library hasn't named it yet
                return blob
        return self._whole if self._whole.exists() else None  # it may have become whole just now

    def ranges(self) -> Mapping[str, TensorRange]:
        """The file's tensors. Of a file that is not here the header is downloaded (or the file, if it must be whole).

        Raises:
            NoSuchFileError: the repository has no such file.
            ModelError: it is not a safetensors file, or the Hub can't be reached.
        """
        if self._ranges is None:
            try:
                self._again_if_changed(self._read_header)
            except RangesNotServed:
                self._download_whole(lambda _: None)
                self._read_header()
        assert self._ranges is not None
        return self._ranges

    def plan(self, names: Sequence[str]) -> DownloadPlan:
        """What is to be downloaded for the tensors ``names``. Downloads the file's header.

        Raises:
            ModelError: no such file or tensor, or the Hub can't be reached.
        """
        return self._again_if_changed(lambda: self._plan(names))

    def download(self, names: Sequence[str], report: Report, stopped: Callable[[], bool]) -> None:
        """Get the tensors ``names``. ``report(bytes)`` as they arrive.

        Raises:
            ModelError: as :meth:`plan`, or the disk is full.
        """
        try:
            self._again_if_changed(lambda: self._download(names, report, stopped))
        except RangesNotServed:
            self._download_whole(report)

    def _plan(self, names: Sequence[str]) -> DownloadPlan:
        if self._whole.exists():
            return DownloadPlan(False, (), 0)
        remote = self._remote()
        try:
            self._read_header()
        except RangesNotServed:
            return DownloadPlan(True, (), remote.size)
        assert self._ranges is not None
        if missing := [name for name in names if name not in self._ranges]:
            raise ModelError(f"tensor {missing[0]} is missing from {self.name} of {self._repo.name!r}, though listed")
        header = (0, min((tensor.start for tensor in self._ranges.values()), default=remote.size))
        wanted = [header, *((self._ranges[name].start, self._ranges[name].stop) for name in names)]
        return plan_download(remote.size, self._partial(remote).present(), wanted)

    def _download(self, names: Sequence[str], report: Report, stopped: Callable[[], bool]) -> None:
        if self._whole.exists():
            return
        self._read_header()
        partial = self._partial(self._remote())
        with partial.locked():
            if self._whole.exists():  # by another process, while this one waited
                return
            plan = self._plan(names)
            if plan.whole:
                raise RangesNotServed
            self._get(partial, plan.missing, report, stopped)
            if not stopped() and partial.present() == [(0, partial.size)]:
                self._complete(partial)

    def _complete(self, partial: PartialFile) -> None:
        if partial.sha256() != partial.path.name:
            partial.remove()
            raise ModelError(
                f"{self.name} of {self._repo.name!r} is all here now, but does not have the SHA-256 that the Hub "
                "says: it has been removed; start again"
            )
        partial.become(self._blob(partial))
        self._fetch_whole(None)  # which finds the blob, and gives it its name

    def _download_whole(self, report: Report) -> None:
        self._fetch_whole(report)
        if (partial := self._known_partial()) is not None:
            partial.remove()

    def _fetch_whole(self, report: Report | None) -> None:
        if self._repo.fetch(self.name, report) is None:
            raise NoSuchFileError(self.name)

    def _read_header(self) -> None:
        """Fills :attr:`_ranges`."""
        if self._ranges is not None:
            return
        try:
            if self._whole.exists():
                with self._whole.open("rb") as file:
                    self._ranges = read_ranges(file, self._whole.stat().st_size)
                return
            remote = self._remote()
            partial = self._partial(remote)
            self._ensure(partial, (0, min(FIRST_READ, remote.size)))
            with self._open(partial) as file:
                self._ensure(partial, (0, data_start(file.read(LENGTH_BYTES), remote.size)))
                self._ranges = read_ranges(file, remote.size)
        except ValueError as error:
            raise ModelError(f"can't read {self.name} of {self._repo.name!r}: {error}") from error

    def _open(self, partial: PartialFile) -> BinaryIO:
        try:
            return partial.path.open("rb")
        except FileNotFoundError:  # another process has just made it whole
            return (self._whole if self._whole.exists() else self._blob(partial)).open("rb")

    def _blob(self, partial: PartialFile) -> Path:
        return self._blobs / partial.path.name

    def _ensure(self, partial: PartialFile, wanted: Range) -> None:
        if not subtract([wanted], partial.present()):
            return
        with partial.locked():
            if not self._whole.exists():
                self._get(partial, subtract([wanted], partial.present()), lambda _: None, lambda: False)

    def _get(self, partial: PartialFile, missing: Sequence[Range], report: Report, stopped: Callable[[], bool]) -> None:
        """Needs the lock."""
        remote, needed = self._remote(), total(missing)
        if needed > (free := shutil.disk_usage(self._folder).free):
            raise ModelError(
                f"{self.name} needs {needed / 2**30:.1f} GiB, but there are {free / 2**30:.1f} GiB left where "
                f"{self._folder} is: make room, or set HF_HOME to a folder on another disk"
            )
        with partial.writer() as writer:

            def write(offset: int, data: bytes) -> None:
                writer.write(offset, data)
                report(len(data))

            for start, stop in missing:
                with self._repo.explained(self.name):
                    download_range(remote, start, stop, write, headers=self._repo.headers(), stopped=stopped)

    def _again_if_changed(self, work: Callable[[], T]) -> T:
        """A commit's files never change; those of a mirror may."""
        try:
            return work()
        except OSError as error:
            raise ModelError(
                f"can't keep {self.name} of {self._repo.name!r} in {self._folder.parent}: {error.strerror or error}; "
                "make it writable, or set HF_HOME to a folder that is"
            ) from error
        except FileChanged:
            if (partial := self._known_partial()) is not None:
                partial.remove()
            self._pointer.unlink(missing_ok=True)
            self._ranges = None
        try:
            return work()
        except FileChanged as error:
            raise ModelError(
                f"{self.name} of {self._repo.name!r} changes while it is downloaded ({error}): check HF_ENDPOINT"
            ) from error

    def _remote(self) -> RemoteFile:
        remote = self._known()
        if remote is None:
            remote = self._repo.remote_file(self.name)
            write_json(self._pointer, {"etag": remote.etag, "size": remote.size})
        return remote

    def _known(self) -> RemoteFile | None:
        """What is known without asking."""
        try:
            found = json.loads(self._pointer.read_text())
            return RemoteFile(self._repo.url(self.name), str(found["etag"]), int(found["size"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _partial(self, remote: RemoteFile) -> PartialFile:
        # Not so of files outside large-file storage, which are small. Checked, as it becomes the name of a file.
        if not _SHA256.fullmatch(remote.etag):
            raise RangesNotServed
        return PartialFile(self._folder, remote.etag, remote.size)

    def _known_partial(self) -> PartialFile | None:
        remote = self._known()
        try:
            return None if remote is None else self._partial(remote)
        except RangesNotServed:
            return None
