"""Which blocks a node serves. Pure functions of plain data, so that tests and simulations call the same code."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.errors import UsageError

MEMORY_SHARE = 0.85
"""How much of the free memory a node plans to use: the rest is for activations and everything else on the machine."""


def coverage(spans: Sequence[tuple[int, int, float]], num_blocks: int) -> list[float]:
    """Throughput of each block, summed over ``(start, end, throughput)`` of the spans in the swarm."""
    total = [0.0] * num_blocks
    for start, end, throughput in spans:
        for block in range(start, end):
            total[block] += throughput
    return total


def choose_start(covered: Sequence[float], num_blocks: int) -> int:
    """Where ``num_blocks`` new blocks help most: the window whose worst-served blocks are worst off.

    Windows are compared by their blocks' throughputs in rising order; the first of equals is taken.
    """
    starts = range(len(covered) - num_blocks + 1)
    return min(starts, key=lambda start: sorted(covered[start : start + num_blocks]))


def blocks_that_fit(free_bytes: Sequence[int], block_bytes: int, cache_bytes_per_block: int, num_blocks: int) -> int:
    """How many blocks fit, with their share of the KV cache, into the memory that is free on each device.

    Raises:
        UsageError: not even one.
    """
    each = block_bytes + cache_bytes_per_block
    fitting = min(num_blocks, sum(int(free * MEMORY_SHARE) // each for free in free_bytes))
    if fitting < 1:
        raise UsageError(
            f"one block needs {each / 2**30:.1f} GiB with its KV cache, and {max(free_bytes) / 2**30:.1f} GiB are "
            "free: free some, or lower --cache-tokens"
        )
    return fitting


def share_blocks(count: int, free_bytes: Sequence[int], bytes_each: int) -> list[int]:
    """How many of ``count`` blocks, of ``bytes_each`` with their KV cache, each device gets, so that what stays free is
    as even as it can be. If they fit at all, they fit like this."""
    left, shares = list(free_bytes), [0] * len(free_bytes)
    for _ in range(count):
        most = max(range(len(left)), key=left.__getitem__)
        shares[most] += 1
        left[most] -= bytes_each
    return shares
