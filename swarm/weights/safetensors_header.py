"""Where in a safetensors file each tensor lies.

The format (https://github.com/huggingface/safetensors) is the length of a JSON header as 8 bytes, little-endian; the
header; the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

LENGTH_BYTES = 8
MAX_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class TensorRange:
    """One tensor in a file: its bytes are ``start:stop`` of the file. ``dtype`` is the format's name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def data_start(first: bytes, size: int) -> int:
    """Where the header ends, from a file's first 8 bytes and its size.

    Raises:
        ValueError: it can't be a safetensors file.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER, size - LENGTH_BYTES):
        raise ValueError("not a safetensors file: its header has an impossible length")
    return LENGTH_BYTES + length


def read_ranges(file: BinaryIO, size: int) -> Mapping[str, TensorRange]:
    """The tensors of a file, from its header.

    Raises:
        ValueError: the header is not one, or tensors lie outside the file or over each other.
    """
    file.seek(0)
    begin = data_start(file.read(LENGTH_BYTES), size)
    found: dict[str, TensorRange] = {}
    try:
        header = json.loads(file.read(begin - LENGTH_BYTES))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                shape = tuple(int(length) for length in entry["shape"])
                found[name] = TensorRange(str(entry["dtype"]), shape, begin + int(start), begin + int(stop))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a safetensors file: {type(error).__name__} in its header") from error
    at = begin
    for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at or entry.stop < at:
            raise ValueError("not a safetensors file: its tensors don't lie one after the other")
        at = entry.stop
    if at != size:
        raise ValueError(f"not a whole safetensors file: {size} bytes where its header says {at}")
    return found
