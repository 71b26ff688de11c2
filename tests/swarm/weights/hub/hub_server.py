"""A Hub of one repository, some/model, on this machine: the calls that downloads use, and whatever can go wrong."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
Fault = Callable[["_Handler", int, int, bytes], bool]
"""Called with the range asked for and its bytes; true if it has answered."""


@dataclass
class Asked:
    """A GET that came."""

    host: str
    file: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class HubServer:
    """Serves ``files``.

    Attributes:
        faults: each is used up by one GET of a range.
        busy: statuses with which HEADs of weights are answered, each once.
        before_head: called before a HEAD of weights is answered.
        cdn: redirect large files to a second server, on another origin.
        gated: answer only to :data:`TOKEN`.
        asked: all GETs so far.
    """

    files: Path
    faults: list[Fault] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    before_head: Callable[[], Any] = lambda: None
    ranges: bool = True
    cdn: bool = False
    gated: bool = False
    etag: str | None = None
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self._servers = [self._start("hub"), self._start("cdn")]
        hub, cdn = (server.server_port for server in self._servers)
        # Of another name, as some versions of the Hub's library follow redirects to the same name
        self.url, self.cdn_url = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"
        return self

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> HubServer:
        """Makes the Hub's library take this for the Hub."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _start(self, host: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def sent(self, suffix: str = ".safetensors") -> int:
        """Bytes of files with that name."""
        return sum(each.sent for each in self.asked if each.file.endswith(suffix))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        owner, name, verb, revision, *rest = [*self.path.strip("/").split("/"), "", "", "", ""]
        filename = "/".join(part for part in rest if part)
        file = self.hub.files / filename
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Asked(self.host, filename, self.headers.get("Range"), token)
        if body:
            self.hub.asked.append(asked)
        if not body and filename.endswith(".safetensors"):
            self.hub.before_head()
        if not body and self.hub.busy and filename.endswith(".safetensors"):
            return self._send(self.hub.busy.pop(), {})
        if self.host == "hub" and self.hub.gated and token != TOKEN:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if (owner, name, verb) != ("some", "model", "resolve") or revision not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        large = filename.endswith(".safetensors")
        etag = self.hub.etag if large and self.hub.etag else hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if large and self.hub.cdn and self.host == "hub":
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            return self._send(302, {**headers, **linked, "Location": self.hub.cdn_url + self.path})
        if self.host == "cdn":
            headers = {"ETag": '"something-of-the-cdn"'}
        if not body:
            return self._send(200, headers, length=len(data))
        if asked.range is None or not self.hub.ranges:
            asked.sent = len(data)
            return self._send(200, headers, data)
        start, last = (int(number) for number in asked.range.removeprefix("bytes=").split("-"))
        part = data[start : last + 1]
        if large and self.hub.faults and self.hub.faults.pop(0)(self, start, len(data), part):
            return None
        asked.sent = len(part)
        return self._send(206, {**headers, "Content-Range": f"bytes {start}-{last}/{len(data)}"}, part)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


def cut(after: int) -> Fault:
    """The connection breaks after so many bytes."""

    def fault(handler: _Handler, start: int, size: int, part: bytes) -> bool:
        handler.hub.asked[-1].sent = min(after, len(part))
        content_range = f"bytes {start}-{start + len(part) - 1}/{size}"
        handler._send(206, {"Content-Range": content_range}, part[:after], length=len(part))
        handler.close_connection = True
        return True

    return fault


def status(code: int, **headers: str) -> Fault:
    """The server answers so instead."""

    def fault(handler: _Handler, start: int, size: int, part: bytes) -> bool:
        handler._send(code, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def mislabeled(*, shift: int = 0, short: int = 0, grown: int = 0) -> Fault:
    """Another range than asked for, a shorter one, or one of a file of another size."""

    def fault(handler: _Handler, start: int, size: int, part: bytes) -> bool:
        part = b"\xff" * (len(part) - short)
        content_range = f"bytes {start + shift}-{start + shift + len(part) - 1}/{size + grown}"
        handler._send(206, {"Content-Range": content_range}, part)
        return True

    return fault


def fine(handler: _Handler, start: int, size: int, part: bytes) -> bool:
    """Nothing goes wrong."""
    return False
