"""Which blocks a node chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.node.placement import blocks_that_fit, choose_start, coverage, share_blocks


def test_the_hole_is_filled_first() -> None:
    assert choose_start(coverage([(0, 3, 1.0), (5, 8, 1.0)], 8), 2) == 3
    assert choose_start(coverage([(0, 8, 5.0), (0, 4, 1.0)], 8), 4) == 4
    assert choose_start(coverage([], 8), 8) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.floats(0.1, 100)), max_size=6), st.integers(1, 10))
def test_the_worst_block_gets_help_wherever_it_is(shapes: list[tuple[int, int, float]], count: int) -> None:
    covered = coverage([(start, min(10, start + length), speed) for start, length, speed in shapes], 10)
    start = choose_start(covered, count)
    assert 0 <= start <= 10 - count
    assert min(covered) in covered[start : start + count]


def test_what_fits() -> None:
    assert blocks_that_fit([100], 10, 0, 80) == 8
    assert blocks_that_fit([10**6], 10, 5, 80) == 80
    assert blocks_that_fit([100, 50, 11], 10, 0, 80) == 8 + 4
    with pytest.raises(UsageError, match="one block needs"):
        blocks_that_fit([100, 50], 90, 10, 80)


def test_larger_devices_get_more_blocks() -> None:
    assert share_blocks(5, [100], 10) == [5]
    assert share_blocks(6, [100, 100], 10) == [3, 3]
    assert share_blocks(7, [100, 50, 10], 10) == [6, 1, 0]
    assert share_blocks(4, [0, 0], 10) == [2, 2]  # too many, as asked: loading will say so


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(1, 50), st.data())
def test_blocks_that_fit_fit_where_they_are_put(free: list[int], each: int, data: st.DataObject) -> None:
    room = sum(one // each for one in free)
    count = data.draw(st.integers(0, room))
    shares = share_blocks(count, free, each)
    assert sum(shares) == count
    assert all(share * each <= one for share, one in zip(shares, free, strict=True))
