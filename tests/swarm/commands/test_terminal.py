"""What commands tell of what isn't their fault."""

from __future__ import annotations

import errno
import os

import pytest

from swarm.commands.terminal import Failure, _unread, explain, require_text
from swarm.errors import ConnectError, OutOfCacheError, UsageError


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectError("nobody"), Failure("nobody", 2)),
        (OutOfCacheError("full"), Failure("full", 1)),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), Failure("", 1)),
        (OSError(errno.ENOSPC, "No space left on device"), Failure("can't write: No space left on device", 1)),
        (OSError(errno.ENOSPC, "No space left on device", "/a/file"), None),
        (ImportError("No module named 'torch'"), None),
        (ValueError("of ours"), None),
    ],
)
def test_errors_in_a_line(error: Exception, failure: Failure | None) -> None:
    assert explain(error) == failure


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
        ValueError("Unknown scheme for proxy URL URL('gopher://x')"),
    ],
)
def test_proxies_that_cannot_be_used(error: Exception) -> None:
    failure = explain(error)
    assert failure is not None
    assert failure.code == 2
    assert "ALL_PROXY" in failure.text


def test_text() -> None:
    assert require_text("café 😀", "it") == "café 😀"
    with pytest.raises(UsageError, match="it is not text"):
        require_text(os.fsdecode(b"caf\xe9"), "it")


def test_a_stream_outlives_its_reader() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        unread = _unread(stream)
        print("read", file=unread, flush=True)
        assert os.read(reading, 9) == b"read\n"
        os.close(reading)
        for _ in range(3):
            print("unread", file=unread, flush=True)
        unread.close()
