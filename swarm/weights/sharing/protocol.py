"""How peers ask each other for weights: what a request looks like, what the replies are, and their limits.

Streams of the servicer ``SwarmWeights``, framed as all of ours (``wire/stream.py``). ``rpc_manifest``: one request
with the root; replies are the parts of the manifest's JSON, deflated, until the end. ``rpc_pieces``: requests one after
the other, answered in order. One that names pieces of a file is answered by a message for each, empty for one that the
peer does not have; one that names none is answered by what the peer has and what it is getting.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadRequestError
from ...wire import rpc
from .manifest import PIECE_BYTES, Manifest
from .picker import Bits

MANIFEST = "SwarmWeights.rpc_manifest"
PIECES = "SwarmWeights.rpc_pieces"

MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = PIECE_BYTES + 4096
MAX_PIECES = 16
"""In one request."""
MAX_MANIFEST_BYTES = 128 << 20
_MAX_HAVE_BYTES = 1 << 22  # of bits: 32 Mi pieces, which are 32 TiB
_ROOT_DIGITS = 64


@dataclass(frozen=True)
class PiecesRequest:
    """``pieces`` of the manifest's file number ``file``; with no pieces: what is there of all files?"""

    root: str
    file: int = 0
    pieces: tuple[int, ...] = ()

    def to_message(self) -> rpc.Request:
        return rpc.Request(metadata=rpc.dump({"root": self.root, "file": self.file, "pieces": list(self.pieces)}))

    @classmethod
    def from_message(cls, message: rpc.Request) -> PiecesRequest:
        """Reads a stranger's request.

        Raises:
            BadRequestError: it is none.
        """
        fields = rpc.load(message.metadata)
        root, file, pieces = fields.get("root"), fields.get("file", 0), fields.get("pieces", [])
        if not isinstance(root, str) or not is_root(root):
            raise BadRequestError("a request for pieces names the root of a manifest")
        if not isinstance(pieces, list) or len(pieces) > MAX_PIECES or not all(map(_is_count, [file, *pieces])):
            raise BadRequestError(f"a request for pieces has a file's number, and at most {MAX_PIECES} of pieces")
        return cls(root, file, tuple(pieces))


def is_root(found: Any) -> bool:
    """Whether ``found`` looks like a manifest's root."""
    return isinstance(found, str) and len(found) == _ROOT_DIGITS and set(found) <= set("0123456789abcdef")


def dump_have(has: Bits, coming: Bits) -> bytes:
    """Two bits for each piece, deflated: mostly they are long rows of the same."""
    return zlib.compress(np.packbits(np.stack([has, coming])).tobytes(), 1)


def load_have(data: bytes, count: int) -> tuple[Bits, Bits]:
    """Reads what :func:`dump_have` wrote for ``count`` pieces.

    Raises:
        BadRequestError: it is not that.
    """
    expected = -(-2 * count // 8)
    bits = inflate(data, min(expected, _MAX_HAVE_BYTES))
    if len(bits) != expected:
        raise BadRequestError("a list of pieces of the wrong length")
    both = np.unpackbits(np.frombuffer(bits, np.uint8), count=2 * count).astype(np.bool_).reshape(2, count)
    return both[0], both[1]


def manifest_parts(manifest: Manifest) -> Iterator[bytes]:
    """The parts in which a manifest is sent."""
    data = zlib.compress(json.dumps(manifest.to_json(), separators=(",", ":")).encode(), 1)
    for at in range(0, len(data), PIECE_BYTES):
        yield data[at : at + PIECE_BYTES]


def join_manifest(data: bytes, root: str) -> Manifest:
    """The manifest that a stranger sent.

    Raises:
        ValueError: it is none, or not the one with that root.
    """
    manifest = Manifest.from_json(json.loads(inflate(data, MAX_MANIFEST_BYTES)))
    if manifest.root != root:
        raise ValueError("a manifest with another root than the one asked for")
    return manifest


def inflate(data: bytes, limit: int) -> bytes:
    """Raises BadRequestError if more than ``limit`` bytes come out, or it isn't deflated data."""
    try:
        machine = zlib.decompressobj()
        found = machine.decompress(data, limit + 1)
    except zlib.error as error:
        raise BadRequestError("data that can't be inflated") from error
    if len(found) > limit or not machine.eof:
        raise BadRequestError("data that is larger than it may be, or cut short")
    return found


def _is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found < 2**31
