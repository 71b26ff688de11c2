"""Which blocks a node chooses, and what it does with its memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.node.hosting.placement.blocks import choose_span, coverage, order_of_need
from swarm.node.hosting.placement.memory import (
    Plan,
    Sizes,
    Wish,
    plan_memory,
    share_blocks,
    usable_together,
    widest_mean,
)

GIB = 2**30
LLAMA_70B = Sizes(
    num_blocks=80,
    block_bytes={"none": int(1.59 * GIB), "int8": int(0.8 * GIB), "nf4": int(0.41 * GIB)},
    token_bytes=4096,
    positions=4096,
)


def test_the_hole_is_filled_first() -> None:
    assert choose_span(coverage([(0, 3, 1.0), (5, 8, 1.0)], 8), 2) == (3, 5)
    assert choose_span(coverage([(0, 8, 5.0), (0, 4, 1.0)], 8), 4) == (4, 8)
    assert choose_span(coverage([], 8), 8) == (0, 8)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.floats(0.1, 100)), max_size=6), st.integers(1, 10))
def test_the_worst_block_gets_help_wherever_it_is(shapes: list[tuple[int, int, float]], count: int) -> None:
    covered = coverage([(start, min(10, start + length), speed) for start, length, speed in shapes], 10)
    start, end = choose_span(covered, count)
    assert 0 <= start < end == start + count <= 10
    assert min(covered) in covered[start:end]


def test_blocks_that_belong_together_are_chosen_together() -> None:
    inner = frozenset({1, 2})  # 0:3 of five
    assert choose_span([0.0] * 5, 4, inner) == (0, 4)
    assert choose_span([1.0, 1.0, 1.0, 1.0, 0.0], 4, inner) == (3, 5)  # there are no four with the last among them
    assert choose_span([0.0, 0.0, 0.0, 1.0, 1.0], 2, inner) == (3, 5)
    with pytest.raises(UsageError, match="at least 5 of this model's have to be on one node"):
        choose_span([0.0] * 5, 4, frozenset({1, 2, 3, 4}))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.integers(1, 9), st.frozensets(st.integers(1, 8)))
def test_nodes_that_come_one_by_one_cover_all_that_fits(
    covered: list[float], count: int, inner: frozenset[int]
) -> None:
    ends = [boundary for boundary in range(len(covered) + 1) if boundary not in inner or boundary == len(covered)]
    inner = frozenset(range(1, len(covered))) - frozenset(ends)
    groups = list(itertools.pairwise(ends))
    assume(any(end - start <= count for start, end in groups))
    for _ in groups:
        start, end = choose_span(covered, count, inner)
        assert end - start <= count
        assert {start, end} <= set(ends)
        covered = [speed + 100 * (start <= block < end) for block, speed in enumerate(covered)]
    assert all(min(covered[start:end]) >= 100 for start, end in groups if end - start <= count)


def test_what_neighbours_need_is_summed_up() -> None:
    assert widest_mean([10, 20, 30, 0], 4) == 15
    assert widest_mean([10, 20, 30, 1], 2) == 25
    assert widest_mean([10, 20, 30, 1], 3) == 20
    assert widest_mean([10, 20, 30, 1], 1) == 30


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


def test_a_quantized_checkpoint_stays_packed_where_that_is_fast_or_nothing_else_fits() -> None:
    def plan(memory: int, fastest: str, quantization: str, blocks: int | None = None, **more: int) -> Plan:
        sizes = Sizes(80, {"none": 8 * GIB, "int8": 4 * GIB, "packed": 2 * GIB, **more}, 4096, 4096, fastest)
        return plan_memory(memory * GIB, sizes, Wish(blocks, quantization, cache_tokens=1024))

    for wish in ("checkpoint", "auto"):
        assert plan(1000, "packed", wish).quantization == "packed"
        fewer = plan(500, "none", wish)
        assert (fewer.quantization, fewer.num_blocks) == ("none", 53)
        assert "--quantization int8 would fit 80" in fewer.reason
        assert plan(1000, "none", wish, blocks=80).quantization == "none"
        tight = plan(500, "none", wish, blocks=80)
        assert (tight.quantization, tight.num_blocks) == ("packed", 80)
        assert "80 × 2.0 GiB packed and" in tight.reason
        assert plan(6, "none", wish).quantization == "packed"
        assert plan(600, "kernels", wish, blocks=80, kernels=5 * GIB).quantization == "kernels"
        assert plan(400, "kernels", wish, blocks=80, kernels=5 * GIB).quantization == "packed"
    assert plan(1000, "packed", "none").quantization == "none"
    assert "--quantization packed would fit 41" in plan(100, "packed", "none").reason
    assert plan(1000, "none", "packed").quantization == "packed"
    assert plan(1000, "none", "int8").quantization == "int8"


sizes = st.builds(
    lambda blocks, block, token, positions, packed: Sizes(
        blocks, {"none": 8 * block, "int8": 4 * block, "nf4": 2 * block} | packed[0](block), token, positions, packed[1]
    ),
    st.integers(1, 80),
    st.integers(1, 1000),
    st.integers(1, 4),
    st.none() | st.integers(1, 10_000),
    st.sampled_from(
        [
            (lambda block: {}, "none"),
            (lambda block: {"packed": 3 * block}, "none"),
            (lambda block: {"packed": 3 * block}, "packed"),
            (lambda block: {"packed": 3 * block, "kernels": 6 * block}, "kernels"),
        ]
    ),
)
wishes = st.builds(
    Wish,
    st.none() | st.integers(1, 80),
    st.sampled_from(["none", "int8", "nf4", "auto", "checkpoint"]),
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
    loading = sizes.block_bytes["none" if plan.quantization in ("int8", "nf4") else plan.quantization]
    cache = plan.num_blocks * plan.cache_tokens * sizes.token_bytes if wish.early else 0
    assert plan.quantization == "none" or weights + loading + cache <= free
    assert 1 <= plan.num_blocks <= sizes.num_blocks
    assert plan.cache_tokens > 0
    assert wish.blocks in (None, plan.num_blocks)
    assert wish.cache_tokens in (None, plan.cache_tokens)
    assert wish.quantization in ("auto", "checkpoint", plan.quantization)


@given(st.integers(0, 10**7), st.integers(0, 10**6), sizes, wishes)
def test_more_memory_never_serves_less(free: int, more: int, sizes: Sizes, wish: Wish) -> None:
    small, large = _plan(free, sizes, wish), _plan(free + more, sizes, wish)
    if small is None:
        return
    assert large is not None
    assert large.num_blocks >= small.num_blocks
    if (large.num_blocks, large.quantization) == (small.num_blocks, small.quantization):
        assert large.cache_tokens >= small.cache_tokens
