"""What one visitor of a gateway can take: connections that ask for nothing, halves of requests, texts without end."""

from __future__ import annotations

import contextlib
import socket
import time
from urllib.parse import urlsplit

import pytest

from swarm.client.gateway import app
from swarm.client.gateway.access import connections
from tests.gateway.conftest import Api, ask


def connect(api: Api, said: bytes = b"") -> socket.socket:
    parts = urlsplit(api.url)
    visitor = socket.create_connection((parts.hostname, parts.port), timeout=30)
    visitor.sendall(said)
    return visitor


def wait_for_the_end(visitor: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while visitor.recv(2**16):
            pass


def is_served(api: Api) -> bool:
    answer = api.post("/completions", {"model": "demo", "prompt": "Hi", "max_tokens": 2})
    return answer.status_code == 200


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
def test_half_a_head_is_waited_for_only_so_long(api: Api, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    visitors = [connect(api, said) for _ in range(20)]
    assert is_served(api)
    for visitor in visitors:
        with visitor:
            wait_for_the_end(visitor)


def test_one_address_has_so_many_connections(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_OF_ONE", 8)
    there = connections.BoundedProtocol._open["127.0.0.1"]
    visitors = [connect(api) for _ in range(8 - there + 1)]
    wait_for_the_end(visitors[-1])
    for visitor in visitors:
        visitor.close()
    deadline = time.monotonic() + 30
    while connections.BoundedProtocol._open["127.0.0.1"] > there:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert is_served(api)


def test_half_a_body(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_PART_SECONDS", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{"
    with connect(api, head) as visitor:
        assert visitor.recv(2**16).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("path", "field", "text"),
    [
        ("/chat/completions", "messages", ask("x" * 8_000_000)),
        ("/completions", "prompt", "x" * 8_000_000),
        ("/responses", "input", "x" * 8_000_000),
        ("/embeddings", "input", "x" * 8_000_000),
    ],
)
def test_a_text_that_is_far_too_long_is_not_read(api: Api, path: str, field: str, text: object) -> None:
    answer = api.post(path, {"model": "demo", field: text})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert "characters" in error["message"]
