"""Names for what a session's cache is computed from, so that nodes can find the beginning of one session in another's.

A row's first name stands for its first ``NAMED_TOKENS`` tokens, each further one for so many more and all before: a
chain of hashes as in vLLM's prefix caching. What is hashed are the hidden states that go in, not token ids, so whatever
the client makes of the tokens (with embeddings or prompts of its own) is in the name, too. What comes out of a hop
depends on the hop as well: that is in the context, which goes with the names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from swarm.wire.codec import raw_bytes
from swarm.wire.rpc import MAX_NAMES, NAME_BYTES, NAMED_TOKENS

from ..routing.route import Leg

Digests = list[list[bytes]]  # of each row, one for each column


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()[:NAME_BYTES]


def column_digests(hidden: torch.Tensor) -> Digests:
    """Digests of the columns of ``hidden`` ``[rows, T, H]``, which is on the CPU."""
    rows, columns, size = hidden.shape
    width = size * hidden.itemsize
    data = memoryview(raw_bytes(hidden.contiguous()))
    digests = [hashlib.sha256(data[at : at + width]).digest()[:NAME_BYTES] for at in range(0, len(data), width)]
    return [digests[row * columns : (row + 1) * columns] for row in range(rows)]


def describe_context(salt: bytes, model: Sequence[str], dtype: torch.dtype, legs: Iterable[Leg]) -> list[bytes]:
    """The context at each of the ``legs`` of a session: what its cache there depends on besides the client's inputs.

    That is the model with its adapter, and the hops before: hidden states that went through another node, or through
    the same with another dtype or quantization, are not the same. Who doesn't know the ``salt`` can't name the context.
    """
    contexts = []
    before = _digest(salt, repr((*model, str(dtype))).encode())
    for leg in legs:
        contexts.append(before)
        info = leg.span.info
        hop = (leg.peer_id.to_base58(), leg.start, leg.end, info.torch_dtype, info.quant_type)
        before = _digest(before, repr(hop).encode())
    return contexts


class PageNames:
    """The names of a session's rows as they are now. Columns of left padding are not in them."""

    def __init__(self, left_padding: Sequence[int]) -> None:
        self._padding = list(left_padding)
        self._digests: Digests = [[] for _ in left_padding]
        self._names: Digests = [[] for _ in left_padding]

    def copy(self) -> PageNames:
        """As they are now, to go on with if what these are extended by next turns out not to have happened."""
        copied = PageNames(self._padding)
        # not their contents: reordering makes other lists, and what is only added is replaced by what is added next
        copied._digests, copied._names = self._digests, self._names
        return copied

    def extend(self, start: int, digests: Digests, hypo_ids: torch.Tensor | None) -> None:
        """Columns from ``start`` on. Those that were there are replaced, after row ``i`` became row ``hypo_ids[i]``."""
        order = range(len(self._padding)) if hypo_ids is None else hypo_ids.tolist()
        self._padding = [self._padding[row] for row in order]
        if hypo_ids is not None:
            self._digests = [list(self._digests[row]) for row in order]
            self._names = [list(self._names[row]) for row in order]
        for names, padding, columns, new in zip(self._names, self._padding, self._digests, digests, strict=True):
            columns[start:] = new
            del names[max(0, start - padding) // NAMED_TOKENS :]
            for at in range(padding + len(names) * NAMED_TOKENS, len(columns) - NAMED_TOKENS + 1, NAMED_TOKENS):
                names.append(_digest(names[-1] if names else b"", *columns[at : at + NAMED_TOKENS]))

    def between(self, start: int, end: int) -> list[bytes] | None:
        """As ``page_names`` stand in a message: of each row those that the columns ``start:end`` complete."""
        limit = MAX_NAMES // len(self._padding)
        rows = []
        for names, padding in zip(self._names, self._padding, strict=True):
            first, last = (max(0, column - padding) // NAMED_TOKENS for column in (start, end))
            rows.append(b"".join(names[first : min(last, first + limit)]))
        return rows if any(rows) else None
