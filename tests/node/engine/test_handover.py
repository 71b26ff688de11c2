"""A session's cache read at one engine and written at another: it holds the same bits, and goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import BadRequestError
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.cache.handover import tensor_shapes
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import Acceleration
from swarm.node.engine.scheduling.row_group import RowGroup
from tests.models import make_checkpoint
from tests.node.engine.attention.paged_reference import KERNEL

Get = Callable[[str], Any]
Start = Callable[..., Engine]
ROWS, COLUMNS, CUT = 3, 21, 8
PADDING = (0, 2, 5)


def hidden(columns: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, columns, size, generator=torch.Generator().manual_seed(seed))


def result(future: Future[Any]) -> Any:
    return future.result(timeout=30)


def read(engine: Engine, session: RowGroup, first: int, last: int, start: int, end: int) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = result(engine.visit(lambda cache: cache.read(session, first, last, start, end)))
    return tensors


def write(
    engine: Engine, session: RowGroup, tensors: list[torch.Tensor], start: int, end: int, columns: int = COLUMNS
) -> None:
    result(engine.visit(lambda cache: cache.write(session, start, end, tensors, columns=columns)))


def filled(engine: Engine, size: int = 64) -> RowGroup:
    """A session with rows of several lengths that beams have reordered."""
    session = engine.open(rows=ROWS, first=engine.span.start, last=engine.span.end, left_padding=PADDING)
    result(engine.step(session, hidden(COLUMNS - 1, size), start=0))
    result(engine.step(session, hidden(1, size, 1), start=COLUMNS - 1, hypo_ids=[1, 0, 1]))
    return session


def hand_over(old: Engine, from_: RowGroup, new: Engine, columns: int = COLUMNS) -> RowGroup:
    """A session at ``new`` with the first columns of the old one, which come in two pieces."""
    span = new.span
    session = new.open(rows=ROWS, first=span.start, last=span.end, left_padding=from_.padding)
    for start, end in ((0, CUT), (CUT, columns)):
        tensors = read(old, from_, span.start, span.end, start, end)
        tokens = from_.total_length(end) - from_.total_length(start)
        assert [(t.shape[0], t.shape[2]) for t in tensors] == tensor_shapes(span, span.start, span.end)
        assert all(tensor.shape[1] == tokens for tensor in tensors)
        write(new, session, tensors, start, end, columns)
    return session


def everything(engine: Engine, session: RowGroup, span: Span) -> list[torch.Tensor]:
    return read(engine, session, span.start, span.end, 0, session.position)


@pytest.mark.parametrize("like", ["llama-gqa", "falcon-7b", "bloom", "mistral-window"])
def test_the_pages_are_the_same_and_the_next_step_goes_on(reference: Get, start_engine: Start, like: str) -> None:
    span = reference(like).span
    old, new = start_engine(span, page_size=4), start_engine(span, page_size=16)
    before = filled(old)
    after = hand_over(old, before, new)
    for mine, theirs in zip(everything(new, after, span), everything(old, before, span), strict=True):
        assert torch.equal(mine, theirs)
    assert new.stats().prefill_tokens == 0
    assert new.stats().handed_over_tokens == before.total_length(COLUMNS)
    more = hidden(2, seed=2)
    expected = result(old.step(before, more, start=COLUMNS, hypo_ids=[2, 0, 1]))
    given = result(new.step(after, more, start=COLUMNS, hypo_ids=[2, 0, 1]))
    torch.testing.assert_close(given, expected)


def test_spans_that_are_split_and_pools_of_another_layout(reference: Get, start_engine: Start) -> None:
    span = reference("llama-gqa").span
    old = start_engine(span)
    before, more = filled(old), hidden(1, seed=2)
    expected = result(old.step(before, more, start=COLUMNS))
    output = more
    for part in (span.part(0, 1), span.part(1, 4)):
        new = start_engine(part, acceleration=Acceleration(KERNEL))
        after = hand_over(old, before, new)
        output = result(new.step(after, output, start=COLUMNS))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("label", ["gemma4-e2b", "deepseek_v3"])
def test_blocks_that_share_a_cache_and_latents(start_engine: Start, tmp_path: Path, label: str) -> None:
    case = next(case for case in CASES if case.label == label)
    span = load_span(resolve(str(make_checkpoint(tmp_path, case.config()))), 1, 5, dtype=torch.float32, device="cpu")
    old, new = start_engine(span), start_engine(span)
    before = filled(old, span.hidden_size)
    after = hand_over(old, before, new)
    more = hidden(1, span.hidden_size, 2)
    expected = result(old.step(before, more, start=COLUMNS))
    torch.testing.assert_close(result(new.step(after, more, start=COLUMNS)), expected)


def test_fewer_columns_than_there_are(reference: Get, start_engine: Start) -> None:
    span = reference("llama-gqa").span
    old, new = start_engine(span), start_engine(span)
    before = filled(old)
    after = hand_over(old, before, new, COLUMNS - 4)
    more = hidden(3, seed=2)
    expected = result(old.step(before, more, start=COLUMNS - 4))
    torch.testing.assert_close(result(new.step(after, more, start=COLUMNS - 4)), expected)


def test_what_a_session_does_not_have(reference: Get, start_engine: Start) -> None:
    span = reference("llama-gqa").span
    old, new = start_engine(span), start_engine(span)
    before = filled(old)
    for first, last, start, end in ((0, 4, 0, COLUMNS + 1), (0, 5, 0, 1), (0, 4, 2, 1)):
        with pytest.raises(BadRequestError, match="not in this session"):
            read(old, before, first, last, start, end)
    tensors = read(old, before, 0, 4, CUT, COLUMNS)
    with pytest.raises(BadRequestError, match="don't follow"):
        session = new.open(rows=ROWS, first=0, last=4, left_padding=before.padding)
        write(new, session, tensors, CUT, COLUMNS)
    old.close(before)
    with pytest.raises(BadRequestError, match="has ended"):
        read(old, before, 0, 4, 0, COLUMNS)


def test_recurrent_states_stay_where_they_are(start_engine: Start, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == "qwen3_next")
    span = load_span(resolve(str(make_checkpoint(tmp_path, case.config()))), 1, 4, dtype=torch.float32, device="cpu")
    engine = start_engine(span)
    session = engine.open(rows=1, first=1, last=4)
    result(engine.step(session, hidden(4)[:1], start=0))
    with pytest.raises(BadRequestError, match="recurrent"):
        read(engine, session, 1, 4, 0, 4)
