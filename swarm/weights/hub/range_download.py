"""One byte range over HTTP, until it is here: cut connections go on where they broke, busy servers are waited for."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from ...chance import CHANCE
from ...compat.hub import transport_error

TRIES = 6
"""In a row without a byte in between."""
FIRST_WAIT = 0.5
LONGEST_WAIT = 300.0
_BUSY = {408, 429, 500, 502, 503, 504}


class RangesNotServed(Exception):
    """The server answers with the whole file, whatever is asked for."""


class FileChanged(Exception):
    """The file is not the one it was."""


class BrokenDownload(Exception):
    """The server can't be brought to send the range. ``str`` is the last reason."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub as its metadata say. ``url`` is the Hub's (it may redirect to a CDN), ``size`` in bytes."""

    url: str
    etag: str
    size: int


def download_range(
    remote: RemoteFile,
    start: int,
    stop: int,
    write: Callable[[int, bytes], None],
    *,
    headers: Mapping[str, str],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Get the bytes ``start:stop`` and hand them on as ``write(offset, data)``.

    Each answer's status, Content-Range, length and, where the Hub itself tells it, ETag must be what was asked for. The
    HTTP client keeps ``headers``' token from hosts that it is redirected to.

    Raises:
        RangesNotServed, FileChanged, BrokenDownload: see there.
        huggingface_hub.errors.HfHubHTTPError: the server refuses (no permission, no such file).
    """
    tries, at = 0, start
    while at < stop and not stopped():
        before, reason, wait = at, "", 0.0
        try:
            with get_session().stream(
                "GET",
                remote.url,
                headers={**headers, "Range": f"bytes={at}-{stop - 1}", "Accept-Encoding": "identity"},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
            ) as response:
                if response.status_code in _BUSY:
                    reason, wait = f"the server answers {response.status_code}", _asked_to_wait(response.headers)
                elif not (reason := _objection(response, remote, at, stop)):
                    for data in response.iter_raw():
                        data = data[: stop - at]
                        write(at, data)
                        at += len(data)
                        if at >= stop or stopped():
                            return
                    if at < stop:
                        reason = "the answer is shorter than it says"
        except transport_error() as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
        tries = 1 if at > before else tries + 1
        if tries >= TRIES:
            raise BrokenDownload(reason)
        _sleep(_waiting(wait, tries), stopped)


def _waiting(asked: float, tries: int) -> float:
    """Seconds, at least what the server has asked for."""
    return min(max(asked, FIRST_WAIT * 2 ** (tries - 1) * CHANCE.uniform(0.75, 1.25)), LONGEST_WAIT)


def _objection(response: Any, remote: RemoteFile, start: int, stop: int) -> str:
    """Why an answer can't be used, though asking again may help; empty if it can."""
    if (etag := _etag_of(response, remote)) not in (None, remote.etag) or response.status_code == 416:
        raise FileChanged(f"its ETag is now {etag}")
    hf_raise_for_status(response)
    if response.status_code == 200 or response.headers.get("Content-Encoding", "identity") != "identity":
        raise RangesNotServed
    if response.status_code != 206:
        return f"the server answers {response.status_code}"
    wanted = f"bytes {start}-{stop - 1}/{remote.size}"
    if (found := response.headers.get("Content-Range")) != wanted:
        return f"asked for {wanted!r}, the server answers with {found!r}"
    if (length := response.headers.get("Content-Length")) not in (None, str(stop - start)):
        return f"asked for {stop - start} bytes, the server sends {length}"
    return ""


def _etag_of(response: Any, remote: RemoteFile) -> str | None:
    """The file's ETag, if this answer or a redirect to it says it. A CDN has ETags of its own, which mean nothing."""
    for answer in [*response.history, response]:
        if linked := answer.headers.get("X-Linked-Etag"):
            return _normalized(linked)
    asked, answered = urlsplit(remote.url), urlsplit(str(response.url))
    etag = response.headers.get("ETag")
    return _normalized(etag) if etag and asked.netloc == answered.netloc and response.status_code < 400 else None


def _normalized(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds, from Retry-After or the Hub's RateLimit (``"api";r=0;t=55``); 0 if neither is there."""
    after = headers.get("Retry-After", "")
    if after.strip().isdigit():
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (TypeError, ValueError):
        limit = parse_ratelimit_headers(headers)
        return 0.0 if limit is None else float(limit.reset_in_seconds)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, 0.5))
