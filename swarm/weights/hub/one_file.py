"""One file of a Hugging Face Hub repository, fetched into the usual cache, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, tqdm

from ...errors import ModelError
from .range_download import FileChanged, RangesNotServed, RemoteFile


class NoSuchFileError(Exception):
    """The repository has no such file."""


@dataclass(frozen=True)
class HubRepo:
    """A repository at one revision. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by the Hub's own library."""

    name: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None

    def fetch(self, filename: str, report: Callable[[int], None] | None = None) -> Path | None:
        """The local path of ``filename``, downloaded whole unless cached; None if the repository has no such file.

        Args:
            report: called with the number of bytes of each piece that has arrived; without it the Hub's library draws
                a progress bar of its own.

        Raises:
            ModelError: no such repository or revision, no permission, or the Hub can't be reached.
        """
        options: dict[str, Any] = {} if report is None else {"tqdm_class": _reporting(report)}
        try:
            with self.explained(filename):
                return Path(
                    hf_hub_download(
                        self.name,
                        filename,
                        revision=self.revision,
                        token=self.token,
                        cache_dir=self.cache_dir,
                        **options,
                    )
                )
        except NoSuchFileError:
            return None

    def headers(self) -> dict[str, str]:
        """What to send with a request to the Hub, the token among it."""
        return build_hf_headers(token=self.token)

    def remote_file(self, filename: str) -> RemoteFile:
        """The Hub's metadata of a file.

        Raises:
            ModelError: as :meth:`fetch`.
            NoSuchFileError: the repository has no such file.
        """
        url = self.url(filename)
        with self.explained(filename):
            found = get_hf_file_metadata(url, token=self.token, retry_on_errors=True)
        if found.etag is None or found.size is None:
            raise ModelError(f"can't get {filename} of {self.name!r}: the server tells neither its ETag nor its size")
        return RemoteFile(url, found.etag, found.size)

    def has(self, filename: str) -> bool:
        """Whether the repository has that file. Raises as :meth:`fetch`."""
        try:
            return bool(self.remote_file(filename))
        except NoSuchFileError:
            return False

    def url(self, filename: str) -> str:
        """Where the Hub (or ``HF_ENDPOINT``) has the file."""
        return hf_hub_url(self.name, filename, revision=self.revision)

    @contextmanager
    def explained(self, filename: str) -> Iterator[None]:
        """Turns what goes wrong into a :class:`ModelError`, or NoSuchFileError if there is no such file."""
        where = f"{self.name!r}" if self.revision is None else f"{self.name!r} at revision {self.revision!r}"
        try:
            yield
        except (ModelError, FileChanged, RangesNotServed):
            raise
        # LocalEntryNotFoundError is also an EntryNotFoundError, and means "not asked", not "not there".
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise ModelError(
                f"can't get {filename} of {where}: the Hub is not reachable and the file is not in the cache; "
                "check the connection (or HF_ENDPOINT), or give the path of a local directory"
            ) from error
        except EntryNotFoundError as error:
            raise NoSuchFileError(filename) from error
        except GatedRepoError as error:
            raise ModelError(
                f"model {where} asks for its terms to be accepted: do so on its Hub page, then pass your token"
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"model {self.name!r} is neither a directory here nor a repository on the Hub: check the spelling, "
                "or pass a token if it is private"
            ) from error
        except RevisionNotFoundError as error:
            raise ModelError(f"model {self.name!r} has no revision {self.revision!r} on the Hub") from error
        except HFValidationError as error:
            raise ModelError(
                f"model {self.name!r} is neither a directory here nor a Hub id (those look like owner/name)"
            ) from error
        except Exception as error:  # network libraries have many error classes, and the user can act on one line only
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"can't get {filename} of {where} from the Hub: {reason[0]}") from error


def _reporting(report: Callable[[int], None]) -> type[tqdm]:
    """A progress bar that draws nothing and tells ``report``."""

    class Reporting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            if initial := kwargs.get("initial"):  # a download that goes on
                report(initial)

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

    return Reporting
