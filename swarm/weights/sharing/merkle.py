"""Merkle trees over the pieces of a file: one hash for all, and a short proof that a piece is one of them.

As in RFC 6962 (Certificate Transparency), section 2.1: leaves and inner nodes are hashed with different prefixes, so
that neither passes for the other, and a tree of any number of leaves is split at the largest power of two below it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


def leaf_hash(piece: bytes) -> bytes:
    """SHA-256 of a piece, as a leaf."""
    return hashlib.sha256(b"\x00" + piece).digest()


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes, in order. No leaves have one too."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256().digest()
    split = _split(len(leaves))
    return _inner(root_of(leaves[:split]), root_of(leaves[split:]))


def proof_of(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from leaf ``index`` to the root, the lowest first.

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*proof_of(leaves[:split], index), root_of(leaves[split:])]
    return [*proof_of(leaves[split:], index - split), root_of(leaves[:split])]


def is_proven(leaf: bytes, index: int, count: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``leaf`` is leaf ``index`` of the ``count`` leaves under ``root``. Any input is fine."""
    return 0 <= index < count and _follow(leaf, index, count, list(proof)) == root


def _follow(leaf: bytes, index: int, count: int, proof: list[bytes]) -> bytes | None:
    if count == 1:
        return leaf if not proof else None
    if not proof:
        return None
    split, sibling = _split(count), proof[-1]
    left = index < split
    below = _follow(leaf, index if left else index - split, split if left else count - split, proof[:-1])
    if below is None:
        return None
    return _inner(below, sibling) if left else _inner(sibling, below)


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(count: int) -> int:
    return 1 << ((count - 1).bit_length() - 1)
