"""Which blocks a node chooses, and what it does with its memory."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.node.placement import (
    Plan,
    Sizes,
    Wish,
    choose_start,
    coverage,
    order_of_need,
    plan_memory,
    share_blocks,
    usable_together,
)

GIB = 2**30
LLAMA_70B = Sizes(
    num_blocks=80,
    block_bytes={"none": int(1.59 * GIB), "int8": int(0.8 * GIB), "nf4": int(0.41 * GIB)},
    token_bytes=4096,
    positions=4096,
)


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


@given(st.integers(0, 9), st.integers(1, 9), st.sets(st.integers(0, 20)), st.lists(st.floats(0, 9), min_size=20))
def test_what_comes_first_is_always_one_run(start: int, count: int, here: set[int], covered: list[float]) -> None:
    order = order_of_need(start, start + count, here, covered)
    assert sorted(order) == list(range(start, start + count))
    for number in range(1, count + 1):
        assert max(order[:number]) - min(order[:number]) == number - 1
    if not here & set(order):
        assert covered[order[0]] == min(covered[start : start + count])
    else:
        assert order[0] in here


def test_what_is_here_comes_first_and_then_what_others_lack() -> None:
    assert order_of_need(0, 4, set(), [0.0, 5.0, 5.0, 5.0]) == [0, 1, 2, 3]
    assert order_of_need(2, 6, set(), [0.0, 0.0, 9.0, 7.0, 1.0, 2.0]) == [4, 5, 3, 2]
    assert order_of_need(0, 6, {1, 3, 4}, [0.0] * 6) == [3, 4, 5, 2, 1, 0]


def test_larger_devices_get_more_blocks() -> None:
    assert share_blocks(5, [100], 10) == [5]
    assert share_blocks(6, [100, 100], 10) == [3, 3]
    assert share_blocks(7, [100, 50, 10], 10) == [6, 1, 0]
    assert share_blocks(4, [0, 0], 10) == [2, 2]  # too many, as asked: loading will say so


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(1, 50), st.data())
def test_blocks_that_are_planned_fit_where_they_are_put(free: list[int], each: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, usable_together(free, each) // each))
    shares = share_blocks(count, free, each)
    assert sum(shares) == count
    assert all(share * each <= one for share, one in zip(shares, free, strict=True))


def test_a_gpu_and_a_large_model() -> None:
    plan = plan_memory(24 * GIB, LLAMA_70B, Wish())
    assert (plan.num_blocks, plan.quantization) == (12, "none")
    assert plan.cache_tokens >= 16384
    assert "--quantization nf4 would fit 43" in plan.reason
    assert plan_memory(24 * GIB, LLAMA_70B, Wish(quantization="auto")).num_blocks == 43
    everything = plan_memory(200 * GIB, LLAMA_70B, Wish(quantization="auto"))
    assert (everything.num_blocks, everything.quantization) == (80, "none")


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UsageError, match=r"40 blocks need .*: serve 13 \(.*; or --quantization nf4$"):
        plan_memory(24 * GIB, LLAMA_70B, Wish(blocks=40))
    with pytest.raises(UsageError, match=r"one block needs .*--cache-tokens \d+$"):
        plan_memory(3 * GIB, LLAMA_70B, Wish(cache_tokens=10**6))
    with pytest.raises(UsageError, match=r"one block needs .*free some memory"):
        plan_memory(GIB, LLAMA_70B, Wish())
    with pytest.raises(UsageError, match="the model has 80 blocks"):
        plan_memory(24 * GIB, LLAMA_70B, Wish(blocks=81))


sizes = st.builds(
    lambda blocks, block, token, positions: Sizes(
        blocks, {"none": 8 * block, "int8": 4 * block, "nf4": 2 * block}, token, positions
    ),
    st.integers(1, 80),
    st.integers(1, 1000),
    st.integers(1, 4),
    st.none() | st.integers(1, 10_000),
)
wishes = st.builds(
    Wish,
    st.none() | st.integers(1, 80),
    st.sampled_from(["none", "int8", "nf4", "auto"]),
    st.none() | st.integers(16, 20_000),
    st.booleans(),
)


def _plan(free: int, sizes: Sizes, wish: Wish) -> Plan | None:
    try:
        return plan_memory(free, sizes, wish)
    except UsageError:
        return None


@given(st.integers(0, 10**7), sizes, wishes)
def test_no_plan_is_larger_than_memory(free: int, sizes: Sizes, wish: Wish) -> None:
    plan = _plan(free, sizes, wish)
    assume(plan is not None)
    assert plan is not None
    weights = plan.num_blocks * sizes.block_bytes[plan.quantization]
    assert weights + plan.num_blocks * plan.cache_tokens * sizes.token_bytes <= free
    cache = plan.num_blocks * plan.cache_tokens * sizes.token_bytes if wish.early else 0
    assert plan.quantization == "none" or weights + sizes.block_bytes["none"] + cache <= free
    assert 1 <= plan.num_blocks <= sizes.num_blocks
    assert plan.cache_tokens > 0
    assert wish.blocks in (None, plan.num_blocks)
    assert wish.cache_tokens in (None, plan.cache_tokens)
    assert wish.quantization in ("auto", plan.quantization)


@given(st.integers(0, 10**7), st.integers(0, 10**6), sizes, wishes)
def test_more_memory_never_serves_less(free: int, more: int, sizes: Sizes, wish: Wish) -> None:
    small, large = _plan(free, sizes, wish), _plan(free + more, sizes, wish)
    if small is None:
        return
    assert large is not None
    assert large.num_blocks >= small.num_blocks
    if (large.num_blocks, large.quantization) == (small.num_blocks, small.quantization):
        assert large.cache_tokens >= small.cache_tokens
