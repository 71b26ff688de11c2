"""Every error the product raises, as one tree with one root, and their form on the wire.

An RPC of hivemind carries an error as text only. Ours starts with a code in brackets, so that the other side can raise
the same class again; text without a code (from Petals, or from hivemind itself) becomes a plain :class:`RemoteError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class SwarmError(Exception):
    """Root of all errors of this project. ``str(error)`` is one line that says what to do."""

    code = "error"


class UsageError(SwarmError):
    """The user's input can't work: unknown model, bad block range, wrong dtype. Commands exit with code 2."""

    code = "usage"


class ModelError(UsageError):
    """The model can't be used: not found, no weights, a tensor is missing, an architecture that isn't known."""

    code = "model"


class ConnectError(UsageError):
    """No peer could be reached, or the own address is taken."""

    code = "connect"


class MissingBlocksError(SwarmError):
    """No node that is online serves some of the model's blocks.

    Attributes:
        blocks: indices of the blocks that nobody serves.
    """

    code = "missing_blocks"

    def __init__(self, message: str, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)


class RemoteError(SwarmError):
    """A peer failed or answered with an error."""

    code = "remote"


class BadRequestError(RemoteError):
    """The peer refused a message as malformed: wrong shape, dtype, size, position or block."""

    code = "bad_request"


class OutOfCacheError(RemoteError):
    """The peer has no KV cache left for this step. Others may have."""

    code = "out_of_cache"


class LeavingError(RemoteError):
    """The peer is shutting down and takes no new sessions."""

    code = "leaving"


class EvictedError(RemoteError):
    """The peer has given the session's cache to others, as the session was idle. Nothing is wrong with the peer."""

    code = "evicted"


class PeerLostError(RemoteError):
    """The peer's stream ended, or it stopped answering."""

    code = "peer_lost"


_BY_CODE: dict[str, type[SwarmError]] = {
    error.code: error
    for error in (
        SwarmError,
        UsageError,
        ModelError,
        RemoteError,
        BadRequestError,
        OutOfCacheError,
        EvictedError,
        LeavingError,
    )
}
_WIRE_FORM = re.compile(r"\[swarm:([a-z_]+)\] ([^\n]*)")


def to_wire(error: BaseException) -> str:
    """The text that carries ``error`` to the peer that caused it."""
    if isinstance(error, SwarmError):
        return f"[swarm:{error.code}] {error}"
    return f"[swarm:{RemoteError.code}] {type(error).__name__}: {error}"


def from_wire(text: str) -> SwarmError:
    """The error that a peer sent as ``text``. Text that has no code of ours becomes a :class:`RemoteError`."""
    found = _WIRE_FORM.search(text)
    if found is None:
        return RemoteError(text.strip() or "the peer failed without saying why")
    return _BY_CODE.get(found[1], RemoteError)(found[2].rstrip("'\")"))


def parse_blocks(text: str, num_blocks: int) -> tuple[int, int]:
    """``"3:9"`` as ``(3, 9)``.

    Raises:
        UsageError: not of the form START:END, or not within the model's ``num_blocks`` blocks.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is None:
        raise UsageError(f"blocks are given as START:END, for example 0:{num_blocks}; got {text!r}")
    start, end = int(found[1]), int(found[2])
    if not 0 <= start < end <= num_blocks:
        raise UsageError(f"blocks {start}:{end} are not in this model: it has blocks 0:{num_blocks}")
    return start, end
