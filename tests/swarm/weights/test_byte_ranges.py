from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.ranges import merge, subtract, total
from swarm.weights.byte_ranges import GAP, WHOLE, plan_download

SIZE = 60
ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=6)


def _bytes(found: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> set[int]:
    return {byte for start, stop in found for byte in range(start, stop)}


@given(ranges, ranges)
def test_sets(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    merged, left = merge(first), subtract(first, second)
    assert _bytes(merged) == _bytes(first)
    assert _bytes(left) == _bytes(first) - _bytes(second)
    assert total(first) == len(_bytes(first))
    for found in (merged, left):
        assert found == sorted(found)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@given(ranges, ranges, st.sampled_from([1, GAP]))
def test_plan(present: list[tuple[int, int]], wanted: list[tuple[int, int]], scale: int) -> None:
    present, wanted = ([(a * scale, b * scale) for a, b in each] for each in (present, wanted))
    plan = plan_download(SIZE * scale, present, wanted)
    needed = subtract(wanted, present)
    if plan.whole:
        assert total(needed) > WHOLE * SIZE * scale
    else:
        assert not subtract(needed, plan.missing), "what is needed is got"
        assert total(plan.missing) == plan.bytes == total(subtract(plan.missing, present)), "and nothing twice"
        assert bool(plan.missing) == bool(needed)


@pytest.mark.parametrize(("hole", "one"), [(GAP, True), (GAP + 1, False)])
def test_small_gaps_are_read_along(hole: int, one: bool) -> None:
    plan = plan_download(100 * GAP, [], [(0, GAP), (GAP + hole, 3 * GAP)])
    assert len(plan.missing) == (1 if one else 2)
