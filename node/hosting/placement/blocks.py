"""Which blocks a node serves, and in which order it gets them. Pure functions of plain data, so that tests and
simulations call the same code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Sequence

from swarm.errors import UsageError


def coverage(spans: Sequence[tuple[int, int, float]], num_blocks: int) -> list[float]:
    """Throughput of each block, summed over ``(start, end, throughput)`` of the spans in the swarm."""
    total = [0.0] * num_blocks
    for start, end, throughput in spans:
        for block in range(start, end):
            total[block] += throughput
    return total


def order_of_need(start: int, end: int, here: Container[int], covered: Sequence[float]) -> list[int]:
    """In which order to get the blocks ``start:end``, so that what is there is always one run, and a useful one.

    It begins with the longest run of blocks that are ``here`` already, else with the block that has the smallest
    throughput in the swarm (``covered``), and goes on to the neighbour that is here, or else has the smaller one.
    """
    runs: list[list[int]] = []
    for block in range(start, end):
        if block in here:
            if not runs or runs[-1][-1] != block - 1:
                runs.append([])
            runs[-1].append(block)
    order = max(runs, key=len) if runs else [min(range(start, end), key=lambda block: covered[block])]
    low, high = order[0], order[-1]
    while len(order) < end - start:
        neighbours = [block for block in (high + 1, low - 1) if start <= block < end]
        order.append(min(neighbours, key=lambda block: (block not in here, covered[block])))
        low, high = min(low, order[-1]), max(high, order[-1])
    return order


def choose_span(covered: Sequence[float], num_blocks: int, inner: frozenset[int] = frozenset()) -> tuple[int, int]:
    """Where ``num_blocks`` new blocks help most: the window whose worst-served blocks are worst off.

    Windows are compared by their blocks' throughputs in rising order; the first of equals is taken. A window begins and
    ends at no ``inner`` boundary (:mod:`swarm.model.layout`), so it may have to be smaller.

    Raises:
        UsageError: all of the model's blocks have to be with more others than ``num_blocks`` have room for.
    """
    ends = [boundary for boundary in range(len(covered) + 1) if boundary not in inner]
    windows: list[tuple[int, int]] = []
    for start in ends[:-1]:
        end = max(boundary for boundary in ends if start <= boundary <= start + num_blocks)
        if end > max(start, windows[-1][1] if windows else 0):  # more than what the window before has already
            windows.append((start, end))
    if not windows:
        least = min(end - start for start, end in itertools.pairwise(ends))
        raise UsageError(
            f"{num_blocks} blocks fit here, but at least {least} of this model's have to be on one node: they share "
            "keys and values. Quantize them (--quantization nf4) or take a larger machine"
        )
    padding = [math.inf] * num_blocks
    return min(windows, key=lambda window: (sorted(covered[slice(*window)]) + padding)[:num_blocks])
