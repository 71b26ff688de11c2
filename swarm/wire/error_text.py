"""Errors as text, which is all that an RPC of hivemind carries of them.

Ours starts with a code in brackets, so that the other side can raise the same class again; text without a code (from
Petals, or from hivemind itself) becomes a plain :class:`RemoteError`, unless it is one of Petals' refusals.
"""

from __future__ import annotations

import re

from ..errors import (
    BadRequestError,
    EvictedError,
    LeavingError,
    ModelError,
    NotServedError,
    OutOfCacheError,
    OutOfOrderError,
    RemoteError,
    SwarmError,
    UsageError,
)

_BY_CODE: dict[str, type[SwarmError]] = {
    error.code: error
    for error in (
        SwarmError,
        UsageError,
        ModelError,
        RemoteError,
        BadRequestError,
        NotServedError,
        OutOfOrderError,
        OutOfCacheError,
        EvictedError,
        LeavingError,
    )
}
# What Petals' servers say, in words of their own, of requests that they could never take, and when they are full.
_PETALS_REFUSALS: dict[str, type[RemoteError]] = {
    "Could not allocate": OutOfCacheError,
    "Cannot allocate KV cache for": BadRequestError,
    "Task size greater than max_batch_size": BadRequestError,
}
_WIRE_FORM = re.compile(r"\[swarm:([a-z_]+)\] ([^\n]*)")


def to_wire(error: BaseException) -> str:
    """The text that carries ``error`` to the peer that caused it."""
    if isinstance(error, SwarmError):
        return f"[swarm:{error.code}] {error}"
    return f"[swarm:{RemoteError.code}] {type(error).__name__}: {error}"


def from_wire(text: str) -> SwarmError:
    """The error that a peer sent as ``text``. Text that has no code of ours becomes a :class:`RemoteError`, or what
    Petals means by it."""
    found = _WIRE_FORM.search(text)
    if found is None:
        kind = next((kind for words, kind in _PETALS_REFUSALS.items() if words in text), RemoteError)
        return kind(text.strip() or "the peer failed without saying why")
    return _BY_CODE.get(found[1], RemoteError)(found[2].rstrip("'\")"))
