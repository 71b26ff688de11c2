"""What a model's config says about its blocks as a whole: which belong together, and what travels between them.

Pure functions of the config, so that a client, which has no blocks, knows the same as the nodes.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import UsageError


def kv_sources(config: Any) -> dict[int, int]:
    """Blocks that attend over the keys and values of another one, and have none of their own: block to that other.

    The last ``num_kv_shared_layers`` (Gemma 3n, Gemma 4) use those of the last block before them of their own type.
    """
    count = config.num_hidden_layers
    first = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    if first == count:
        return {}
    last_of = {kind: block for block, kind in enumerate(config.layer_types[:first])}
    return {block: last_of[config.layer_types[block]] for block in range(first, count)}


def inner_boundaries(config: Any) -> frozenset[int]:
    """The blocks at which nothing may begin or end, neither a node's span nor a part of a route: the block there, or
    one behind it, needs what the node holds of one before."""
    return frozenset(inner for block, source in kv_sources(config).items() for inner in range(source + 1, block + 1))


def group_of(boundary: int, inner: frozenset[int]) -> tuple[int, int]:
    """The blocks around an inner ``boundary`` that are kept together, as ``(start, end)``."""
    start = end = boundary
    while start in inner:
        start -= 1
    while end in inner:
        end += 1
    return start, end


def check_range(start: int, end: int, inner: frozenset[int]) -> None:
    """Whether the blocks ``start:end`` can be used without those around them.

    Raises:
        UsageError: they can't.
    """
    for boundary in (start, end):
        if boundary in inner:
            first, last = group_of(boundary, inner)
            raise UsageError(
                f"blocks {start}:{end} can't be used without those around them: {first}:{last} share keys and values, "
                f"so take all of these or none"
            )


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


def carried_size(config: Any) -> int:
    """Numbers of each token that go from block to block: the hidden size in most models.

    Where blocks have an input of their own for each token (``hidden_size_per_layer_input``), all of these go along.
    Gemma 3n has several hidden states side by side (``altup_num_inputs``).
    """
    streams = getattr(config, "altup_num_inputs", None) or 1
    per_block = getattr(config, "hidden_size_per_layer_input", None) or 0
    return streams * config.hidden_size + config.num_hidden_layers * per_block
