"""A session's bits on a deterministic engine are the same alone and in any company."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.compute.tiles import agreeing_sizes, split_rows, tiled
from swarm.errors import UsageError
from swarm.model.loading import load_span
from swarm.model.probe import KVGeometry
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.attention.batch import pack
from swarm.node.engine.blocks.packing import pack_block
from swarm.node.engine.cache.kv_cache import KVCache, Row
from swarm.node.engine.deterministic import check, make_deterministic
from swarm.node.engine.engine import Engine
from swarm.node.engine.scheduling.scheduler import Waiting, columns_per_piece, plan_turn
from tests.models import tiny_model

MODELS = [
    ("llama-gqa", "float32", True),
    ("llama-gqa", "float32", False),
    ("llama-gqa", "bfloat16", True),
    ("falcon-180b", "float32", True),
    ("bloom", "float32", True),
    ("bloom", "bfloat16", True),
    ("mixtral", "float32", True),
    ("mixtral", "bfloat16", True),
    ("mistral-window", "float32", True),
]


@functools.cache
def span_of(like: str, dtype: str, packed: bool, *, deterministic: bool = True) -> Span:
    # 284 is no multiple of a vector; so are the widths of some models
    path = tiny_model(like, layers=2, hidden=72, heads=4, intermediate=284) if like.startswith("llama") else None
    path = path or tiny_model(like, layers=2)
    kind = getattr(torch, dtype)
    source = resolve(str(path))
    span = load_span(source, 0, 2, dtype=kind, device="cpu", finish=pack_block if packed else None)
    if deterministic:
        for block in span.blocks:
            make_deterministic(block)
    return span


def watched(engine: Engine, others: int, seed: int) -> list[torch.Tensor]:
    """Outputs of a session that does the same each time, while ``others`` do something of ``seed``'s choice."""
    chance = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    size = engine.span.hidden_size
    mine = torch.randn(2, 160, size, generator=torch.Generator().manual_seed(0))
    crowd = [engine.open(rows=chance.choice((1, 1, 3)), first=0, last=2) for _ in range(others)]
    at = [0] * others
    pending: list[Future[Any]] = []

    def disturb() -> None:
        for number in range(others):
            if crowd[number].closed or chance.random() < 0.2:
                continue
            columns = chance.choice((1, 1, 1, 2, 7, 30, 75))
            if at[number] + columns > 150 or chance.random() < 0.1:  # room for others between the pages of the rest
                engine.close(crowd[number])
                crowd[number] = engine.open(rows=len(crowd[number].rows), first=0, last=2)
                at[number] = 0
            hidden = torch.randn(len(crowd[number].rows), columns, size, generator=noise)
            pending.append(engine.step(crowd[number], hidden, start=at[number]))
            at[number] += columns
        if others and chance.random() < 0.3:
            pending.append(engine.forward(torch.randn(2, 9, size, generator=noise), first=0, last=2))

    disturb()
    session = engine.open(rows=2, first=0, last=2, left_padding=[0, 3])
    outputs: list[torch.Tensor] = []
    begin = 0
    for end in (100, 101, 102, 103, 108, 109, 150, 151, 140, 141):
        begin = min(begin, end - 1)  # back once: what was there is forgotten
        disturb()
        outputs.append(engine.step(session, mine[:, begin:end], start=begin).result())
        begin = end
    outputs.append(engine.forward(mine[:, :40], first=0, last=2).result())
    engine.close(session)
    for future in pending:
        with suppress(CancelledError):
            future.result(timeout=60)
    for one in crowd:
        engine.close(one)
    return outputs


def same(mine: list[torch.Tensor], again: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))


@pytest.mark.parametrize(("like", "dtype", "packed"), MODELS)
def test_bits_do_not_depend_on_the_company(
    like: str, dtype: str, packed: bool, start_engine: Callable[..., Engine]
) -> None:
    span = span_of(like, dtype, packed)
    engine = start_engine(span, deterministic=True, max_batch_tokens=200, cache_tokens=8192)
    alone = watched(engine, 0, 0)
    for seed in range(1, 5):
        assert same(alone, watched(engine, (3, 8, 1, 17)[seed - 1], seed)), seed
    check(span)


def test_what_is_computed_is_still_right(reference: Callable[[str], Any], start_engine: Callable[..., Engine]) -> None:
    for like in ("llama-gqa", "mixtral", "bloom"):
        states = reference(like).blocks(torch.randint(3, 300, (2, 90), generator=torch.Generator().manual_seed(0)))
        source = resolve(str(tiny_model(like, layers=4)))
        span = load_span(source, 0, 4, dtype=torch.float32, device="cpu", finish=pack_block)
        for block in span.blocks:
            make_deterministic(block)
        engine = start_engine(span, deterministic=True)
        session = engine.open(rows=2, first=0, last=4)
        output = torch.cat(
            [engine.step(session, states[0][:, a:b], start=a).result() for a, b in ((0, 88), (88, 89), (89, 90))], 1
        )
        torch.testing.assert_close(output, states[4], atol=1e-5 * float(states[4].abs().max()), rtol=0)
        hidden = states[0].clone()
        grad, _ = engine.backward(hidden, torch.ones_like(hidden), first=0, last=4).result()
        plain = start_engine(reference(like).span)
        expected, _ = plain.backward(hidden, torch.ones_like(hidden), first=0, last=4).result()
        torch.testing.assert_close(grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_block_that_mixes_rows_is_noticed() -> None:
    span = span_of("llama-mha", "float32", True)

    class Mixing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (1 + 1e-7 * x.abs().amax())

    block = span.blocks[1]
    inner = block.mlp
    block.mlp = Mixing(inner)
    try:
        with pytest.raises(UsageError, match="--deterministic can't be kept for llama"):
            check(span)
    finally:
        block.mlp = inner
    check(span)


@settings(max_examples=60)
@given(st.integers(1, 300), st.sets(st.sampled_from((1, 2, 3, 4, 8, 16, 64)), min_size=1))
def test_tiles_cover_all_rows(rows: int, sizes: set[int]) -> None:
    tiles = split_rows(rows, tuple(sorted(sizes)))
    assert set(tiles) <= sizes
    assert sum(tiles) - tiles[-1] < rows <= sum(tiles)


def test_only_sizes_that_agree_are_used() -> None:
    sizes: list[int] = []

    def compute(x: torch.Tensor) -> torch.Tensor:  # three ways to add up, as kernels have
        sizes.append(len(x))
        columns = x.unbind(1)
        order = columns[::-1] if len(x) == 1 else columns if len(x) < 8 else (*columns[::2], *columns[1::2])
        return functools.reduce(torch.add, order)[:, None].expand(-1, 64)

    assert agreeing_sizes(compute, torch.empty(1, 40)) == (8, 12, 16, 24, 32, 48, 64)
    x = torch.randn(9, 40)
    key = object()
    whole = tiled(compute, x, key)
    sizes.clear()
    for row in range(9):
        assert torch.equal(tiled(compute, x[row : row + 1], key), whole[row : row + 1])
    assert set(sizes) == {8}


def test_rows_that_look_at_each_other_are_computed_one_by_one() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:  # as a layer that scales its input by the largest of all
        return (x / x.abs().max()).round(decimals=2) * x.abs().max()

    assert agreeing_sizes(compute, torch.empty(1, 64)) == (1,)


@settings(max_examples=200)
@given(st.data())
def test_steps_are_cut_at_fixed_columns(data: st.DataObject) -> None:
    integers = st.integers
    waiting = []
    for _ in range(data.draw(integers(1, 6))):
        rows = data.draw(integers(1, 80))
        piece = columns_per_piece(rows)
        start = data.draw(integers(0, 200))
        columns = data.draw(integers(1, 300))
        waiting.append(Waiting((0, 1), rows, columns, data.draw(st.booleans()), start, piece))
    turn = plan_turn(waiting, budget=data.draw(integers(1, 600)), prefill_budget=data.draw(integers(64, 600)))
    assert turn is not None
    for index, columns in turn.takes:
        work = waiting[index]
        assert 0 < columns <= work.columns
        assert columns == work.columns or (work.start + columns) % work.piece == 0


def test_segments_end_at_fixed_columns_of_a_row_with_padding() -> None:
    cache = KVCache(start=0, tokens=512, page_size=16, kv=[KVGeometry(1, 4, 4)], dtype=torch.float32, device=CPU)
    rows = cache.arrange([Row(), Row()], sources=None, keep=[0, 0], grow=[100, 97], blocks=range(1))
    whole = pack(cache, [(rows[0], 100), (rows[1], 97)], CPU, pieces=[(0, 32), (3, 32)])
    assert [(segment.begin, segment.end, segment.past) for segment in whole.segments] == [
        *[(0, 32, 0), (32, 64, 32), (64, 96, 64), (96, 100, 96)],
        *[(100, 129, 0), (129, 161, 29), (161, 193, 61), (193, 197, 93)],
    ]


CPU = torch.device("cpu")
