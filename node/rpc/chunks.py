"""How the cache of a session goes from node to node: some columns of all blocks in each message, checked on arrival."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from swarm.errors import MalformedError
from swarm.wire import rpc
from swarm.wire.codec import DTYPES, all_finite, decode, encode
from swarm.wire.rpc import Response

_BYTES = 2**22
_MESSAGE_EXTRA_BYTES = 2**20


@dataclass(frozen=True)
class ChunkFormat:
    """What both sides know of the chunks.

    Attributes:
        shapes: heads and size of a head of each tensor, ``[heads, tokens, size]``.
        dtype: of all of them.
        padding: columns that each row ignores at its left.
    """

    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    padding: tuple[int, ...]

    @property
    def column_bytes(self) -> int:
        """Of one column of all rows."""
        return len(self.padding) * self.dtype.itemsize * sum(heads * size for heads, size in self.shapes)

    @property
    def message_bytes(self) -> int:
        """Of the largest message."""
        return max(_BYTES, self.column_bytes) + _MESSAGE_EXTRA_BYTES

    def divide(self, columns: int) -> Iterator[tuple[int, int]]:
        """``columns`` in chunks, each from a column to another."""
        width = max(1, _BYTES // max(1, self.column_bytes))
        for start in range(0, columns, width):
            yield start, min(columns, start + width)

    def tokens(self, start: int, end: int) -> int:
        """How many tokens of all rows are in the columns ``start:end``."""
        return sum(max(0, end - padding) - max(0, start - padding) for padding in self.padding)


def write_chunk(tensors: Sequence[torch.Tensor], end: int) -> Response:
    """A chunk whose last column is the one before ``end``."""
    return Response(tensors=[encode(tensor) for tensor in tensors], metadata=rpc.dump({"end": end}))


def read_chunk(response: Response, form: ChunkFormat, start: int, columns: int) -> tuple[int, list[torch.Tensor]]:
    """Where a chunk that begins at column ``start`` of ``columns`` ends, and its tensors.

    Raises:
        MalformedError: it is not what was asked for, or has numbers that are not finite.
    """
    end = rpc.load(response.metadata).get("end")
    if type(end) is not int or not start < end <= columns or len(response.tensors) != len(form.shapes):
        raise MalformedError(f"a chunk of {len(response.tensors)} tensors from column {start} to {str(end)[:20]}")
    tokens = form.tokens(start, end)
    tensors = []
    for message, (heads, size) in zip(response.tensors, form.shapes, strict=True):
        if tuple(message.size) != (heads, tokens, size) or DTYPES.get(message.dtype) != form.dtype:
            raise MalformedError(f"a chunk with a tensor {tuple(message.size)[:8]} of {message.dtype[:40]!r}")
        tensor = decode(message, max_elements=heads * tokens * size)
        if not all_finite(tensor):
            raise MalformedError("a chunk with numbers that are not finite")
        tensors.append(tensor)
    return end, tensors
