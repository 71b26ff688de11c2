"""What commands owe whoever started them: bytes that are no text, a reader who has left, a full disk or a proxy that
can't be used are one line on stderr, or nothing. Never a traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from ..errors import BadRequestError, SwarmError, UsageError
from .hidden import SECRETS

_PROXY = re.compile("socksio|proxy URL")  # how httpx speaks of proxies that it can't use


@dataclass(frozen=True)
class Failure:
    """How a command ends: ``text`` is for stderr, and empty if there is nothing to be said; ``code`` is 1 or 2."""

    text: str
    code: int


def explain(error: BaseException) -> Failure | None:
    """What to tell of an error that is no fault of ours; None for others, whose traceback is needed."""
    if isinstance(error, SwarmError):
        return Failure(str(error), 2 if isinstance(error, (UsageError, BadRequestError)) else 1)
    if isinstance(error, UnicodeError):
        return Failure(f"this is not text: {error}", 2)
    if isinstance(error, (ImportError, ValueError)) and _PROXY.search(str(error)):
        return Failure(f"the proxy that the environment names (ALL_PROXY, HTTPS_PROXY, …) can't be used: {error}", 2)
    if isinstance(error, BrokenPipeError):
        return Failure("", 1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO) and error.filename is None:
        return Failure(f"can't write: {error.strerror}", 1)
    return None


def run(command: Callable[[], object]) -> None:
    """Runs a command, which reads ``sys.argv``, and exits."""
    _complete_streams()
    try:
        for argument in (
            *sys.argv[1:],
            *(value for name, value in os.environ.items() if name.startswith("SWARM_") and name not in SECRETS),
        ):
            require_text(argument, f"the argument {argument!r}")
        command()
        code: object = 0
    except SystemExit as end:
        code = end.code
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        code = tell(failure)
    sys.exit(flush() or code)  # type: ignore[arg-type]


def tell(failure: Failure) -> int:
    """Says it; its exit code."""
    if failure.text:
        print(f"Error: {failure.text}", file=sys.stderr)
    return failure.code


def flush() -> int:
    """Writes what is still to be written. Not 0 if that fails: then Python, when it exits, doesn't try again."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = tell(explain(error) or Failure(str(error), 1))
    return code


def require_text(text: str, what: str) -> str:
    """``text``, as it is. Bytes that were none are half characters in it, which no tokenizer takes.

    Raises:
        UsageError: there are such.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not text in UTF-8") from None
    return text


def text_input() -> TextIO:
    """stdin as text; what isn't text can be read too, and is refused by :func:`require_text`."""
    return io.TextIOWrapper(sys.stdin.buffer, encoding=sys.stdin.encoding, errors="surrogateescape")


def outlive_readers() -> None:
    """For commands that serve others: they go on when nobody reads any more what they write."""
    sys.stdout, sys.stderr = _unread(sys.stdout), _unread(sys.stderr)


class _Unread(io.FileIO):
    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            return len(data)  # type: ignore[arg-type]


def _unread(stream: TextIO) -> TextIO:
    stream.flush()
    raw = io.BufferedWriter(_Unread(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=bool(stream.line_buffering))


def _complete_streams() -> None:
    """Streams that the caller has closed become empty ones, before a socket gets their numbers; and what a terminal has
    no letters for is written in escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which gets the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
