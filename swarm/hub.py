"""One file of a Hugging Face Hub repository, fetched into the usual cache, with errors that say what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from swarm.errors import ModelError


@dataclass(frozen=True)
class HubRepo:
    """A repository at one revision. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by the Hub's own library."""

    name: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None

    def fetch(self, filename: str) -> Path | None:
        """The local path of ``filename``, downloaded unless cached; None if the repository has no such file.

        Raises:
            ModelError: no such repository or revision, no permission, or the Hub can't be reached.
        """
        where = f"{self.name!r}" if self.revision is None else f"{self.name!r} at revision {self.revision!r}"
        try:
            found = hf_hub_download(
                self.name, filename, revision=self.revision, token=self.token, cache_dir=self.cache_dir
            )
        # LocalEntryNotFoundError is also an EntryNotFoundError, and means "not asked", not "not there".
        except LocalEntryNotFoundError as error:
            raise ModelError(
                f"can't get {filename} of {where}: the Hub is not reachable and the file is not in the cache; "
                "check the connection (or HF_ENDPOINT), or give the path of a local directory"
            ) from error
        except EntryNotFoundError:
            return None
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
        return Path(found)
