"""Rows whose layers keep recurrent states: what can't be done with them is said, and what can is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.errors import BadRequestError, OutOfCacheError, RemoteError
from swarm.model.families.mixers import MixerStates
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.probe import KVGeometry
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.cache.kv_cache import Row
from swarm.node.engine.cache.states import StateStore, join, split
from swarm.node.engine.engine import Engine
from tests.models import make_checkpoint

Start = Callable[..., Engine]


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    case = next(case for case in CASES if case.model_type == "qwen3_next")
    source = resolve(str(make_checkpoint(tmp_path_factory.mktemp("model"), case.config())))
    return load_span(source, 1, 4, dtype=torch.float32, device="cpu")  # two with a state, one with attention


def hidden(columns: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, 64, generator=torch.Generator().manual_seed(seed))


def test_what_a_span_keeps(span: Span) -> None:
    assert span.kv == (None, None, KVGeometry(2, 16, 16))
    # the convolution's last 4 inputs of 2 · 2 · 8 + 4 · 12 channels, and 4 heads of 8 × 12, in each of two blocks
    assert span.state_bytes == 2 * 4 * (4 * 80 + 4 * 8 * 12)


def test_cut_back_is_refused_but_not_from_the_start(span: Span, start_engine: Start) -> None:
    engine = start_engine(span)
    assert engine._cache.keys[1].numel() == 0
    session = engine.open(rows=1, first=1, last=4)
    first = engine.step(session, hidden(9), start=0).result()
    with pytest.raises(BadRequestError, match="can't go back"):
        engine.step(session, hidden(2, seed=1), start=5).result()
    more = engine.step(session, hidden(2, seed=1), start=9).result()  # the session is as it was
    whole = engine.forward(torch.cat([hidden(9), hidden(2, seed=1)], 1), first=1, last=4).result()
    torch.testing.assert_close(torch.cat([first, more], 1), whole, atol=1e-4, rtol=1e-4)
    again = engine.step(session, hidden(9), start=0).result()
    torch.testing.assert_close(again, first, atol=1e-4, rtol=1e-4)


def test_rows_are_limited(span: Span, start_engine: Start) -> None:
    engine = start_engine(span, state_rows=3)
    session = engine.open(rows=2, first=1, last=4)
    engine.step(session, hidden(3, rows=2), start=0).result()
    with pytest.raises(OutOfCacheError, match="3 rows"):
        engine.step(session, hidden(1, rows=4), start=3, hypo_ids=[0, 0, 1, 1]).result()
    engine.step(session, hidden(1, rows=3), start=3, hypo_ids=[0, 0, 1]).result()
    other = engine.open(rows=1, first=1, last=4)
    with pytest.raises(OutOfCacheError):
        engine.step(other, hidden(3), start=0).result()
    engine.close(session)
    engine.step(other, hidden(3), start=0).result()


def test_a_failed_batch_ends_the_session(span: Span, start_engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start_engine(span)
    session = engine.open(rows=1, first=1, last=4)
    engine.step(session, hidden(3), start=0).result()

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(span.blocks[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="broken"):
            engine.step(session, hidden(1), start=3).result()
    with pytest.raises(RemoteError, match="open a new session"):
        engine.step(session, hidden(1), start=3).result()


def test_left_padding(span: Span, start_engine: Start) -> None:
    engine = start_engine(span, max_batch_tokens=7)
    session = engine.open(rows=2, first=1, last=4, left_padding=[0, 5])
    given = hidden(12, rows=2)
    parts = [engine.step(session, given[:, :10], start=0).result()]
    parts += [engine.step(session, given[:, at : at + 1], start=at).result() for at in (10, 11)]
    output = torch.cat(parts, 1)
    expected = [engine.forward(given[row : row + 1, pad:], first=1, last=4).result() for row, pad in ((0, 0), (1, 5))]
    torch.testing.assert_close(output[0], expected[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output[1, 5:], expected[1][0], atol=1e-4, rtol=1e-4)


def test_store_shares_and_forgets() -> None:
    store, one = StateStore(2), Row(length=4)
    store.arrange([one], [one], None, [0])
    assert store.of(one) == {}
    store.of(one)[7] = MixerStates({0: torch.zeros(1, 2, 3)})
    left, right = Row(length=4), Row(length=4)
    store.check([one], [0, 0], [4, 4])
    store.arrange([one], [left, right], [0, 0], [4, 4])
    store.of(left)[7] = MixerStates()
    assert store.of(right)[7].conv[0].shape == (1, 2, 3)
    store.release([left, right])
    with pytest.raises(KeyError):
        store.of(left)


def test_join_and_split() -> None:
    rows = [MixerStates({0: torch.full((1, 2), float(number))}, {1: torch.ones(1, 3)}) for number in range(3)]
    joined = join(rows)
    joined.conv[0] += 1
    assert [float(states.conv[0][0, 0]) for states in rows] == [0, 1, 2]
    apart = split(joined, 3)
    assert [float(states.conv[0][0, 0]) for states in apart] == [1, 2, 3]
    assert all(states.recurrent[1].shape == (1, 3) for states in apart)
