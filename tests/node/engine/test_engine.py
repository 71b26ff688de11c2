"""The engine's thread: order, errors, closing, cache limits, stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadRequestError, LeavingError, OutOfCacheError, RemoteError
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import Acceleration
from swarm.node.engine.scheduling.messages import Prefix
from swarm.node.engine.scheduling.turnstile import Turnstile
from tests.node.engine.attention.paged_reference import KERNEL

Get = Callable[[str], Any]
Start = Callable[..., Engine]
SIZE = 64
WAIT_S = 30


class FragileSpan:
    """A span that fails on demand: on blocks in ``failing``, and that waits for ``gate`` if there is one."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self.failing: set[int] = set()
        self.gate: threading.Event | None = None
        self.entered = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._span, name)

    def run(self, block: int, hidden: torch.Tensor, prepared: Any, batch: Any) -> torch.Tensor:
        self.entered.set()
        if self.gate is not None:
            self.gate.wait(WAIT_S)
        output: torch.Tensor = self._span.run(block, hidden, prepared, batch)
        if block in self.failing:
            raise RuntimeError("the block broke")
        return output


def hidden(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def span(reference: Get) -> FragileSpan:
    return FragileSpan(reference("llama-gqa").span)


def result(future: Future[Any]) -> Any:
    return future.result(timeout=WAIT_S)


def test_out_of_cache_hits_one_step_only_and_changes_nothing(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span, cache_tokens=40, page_size=4)
    small, large = engine.open(rows=1, first=0, last=4), engine.open(rows=2, first=0, last=4)
    inputs = hidden(2, 12)
    expected = result(engine.forward(inputs, first=0, last=4))
    result(engine.step(large, inputs[:, :10], start=0))
    result(engine.step(small, inputs[:1, :8], start=0))
    assert engine.stats().cache_tokens_free == 40 - 24 - 8
    with pytest.raises(OutOfCacheError):
        result(engine.step(large, hidden(2, 20), start=4))
    with pytest.raises(OutOfCacheError):
        result(engine.step(large, hidden(6, 1), start=10, hypo_ids=[0, 1, 0, 1, 0, 1]))
    assert large.position == 10
    torch.testing.assert_close(result(engine.step(large, inputs[:, 10:], start=10)), expected[:, 10:])
    torch.testing.assert_close(result(engine.step(small, inputs[:1, 8:], start=8)), expected[:1, 8:])
    engine.step(small, hidden(1, 4), start=12).exception(timeout=WAIT_S)
    with pytest.raises(OutOfCacheError):
        engine.open(rows=11, first=0, last=4)
    engine.close(large)
    engine.close(small)
    result(engine.forward(inputs, first=0, last=4))
    assert engine.stats().cache_tokens_free == 40


def test_a_failed_batch_leaves_the_sessions_as_they_were(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session = engine.open(rows=1, first=0, last=4)
    inputs = hidden(1, 20)
    expected = result(engine.forward(inputs, first=0, last=4))
    result(engine.step(session, inputs[:, :5], start=0))
    free = engine.stats().cache_tokens_free
    span.failing = {2}
    with pytest.raises(RuntimeError, match="broke"):
        result(engine.step(session, inputs[:, 5:], start=5))
    with pytest.raises(RuntimeError, match="broke"):
        result(engine.forward(inputs, first=0, last=4))
    with pytest.raises(RuntimeError, match="broke"):
        result(engine.backward(inputs, inputs, first=0, last=4))
    span.failing = set()
    assert engine.stats().cache_tokens_free == free
    assert engine.stats().failures == 3
    torch.testing.assert_close(result(engine.step(session, inputs[:, 5:], start=5)), expected[:, 5:])


def test_a_failed_reorder_breaks_its_session(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session = engine.open(rows=2, first=0, last=4)
    result(engine.step(session, hidden(2, 5), start=0))
    span.failing = {0}
    with pytest.raises(RuntimeError, match="broke"):
        result(engine.step(session, hidden(2, 1), start=5, hypo_ids=[1, 1]))
    span.failing = set()
    with pytest.raises(RemoteError, match="open a new session"):
        result(engine.step(session, hidden(2, 1), start=5))


def test_malformed_steps_are_refused_and_change_nothing(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session = engine.open(rows=2, first=1, last=3)
    result(engine.step(session, hidden(2, 3), start=0))
    bad: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (hidden(2, 1), {"start": 4}),
        (hidden(2, 1), {"start": -1}),
        (hidden(3, 1), {"start": 3}),
        (hidden(2, 1)[0], {"start": 3}),
        (hidden(2, 1)[..., :5], {"start": 3}),
        (hidden(2, 1).long(), {"start": 3}),
        (hidden(2, 1), {"start": 3, "hypo_ids": [0, 2]}),
        (hidden(2, 1), {"start": 3, "hypo_ids": [0]}),
        (hidden(2, 1), {"start": 3, "prompts": torch.zeros(1, 2, 1, SIZE)}),
        (hidden(2, 1), {"start": 3, "prompts": torch.zeros(2, 3, 1, SIZE)}),
    ]
    for inputs, options in bad:
        with pytest.raises(BadRequestError):
            result(engine.step(session, inputs, **options))
    assert session.position == 3
    for first, last in ((0, 5), (3, 3), (-1, 2)):
        with pytest.raises(BadRequestError):
            engine.open(rows=1, first=first, last=last)
        with pytest.raises(BadRequestError):
            result(engine.forward(hidden(1, 1), first=first, last=last))
    with pytest.raises(BadRequestError):
        engine.open(rows=2, first=0, last=4, left_padding=[1])
    with pytest.raises(BadRequestError):
        result(engine.backward(hidden(1, 2), hidden(1, 3), first=0, last=4))
    result(engine.step(session, hidden(2, 1), start=3))


def test_closing_cancels_what_waits(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span, max_batch_tokens=16)
    session, other = engine.open(rows=1, first=0, last=4), engine.open(rows=1, first=0, last=4)
    span.gate = threading.Event()
    begun = engine.step(session, hidden(1, 40), start=0)
    assert span.entered.wait(WAIT_S)
    waiting = engine.step(session, hidden(1, 1), start=40)
    kept = engine.step(other, hidden(1, 3), start=0)
    engine.close(session)
    engine.close(session)
    late = engine.step(session, hidden(1, 1), start=41)
    span.gate.set()
    for future in (begun, waiting, late):
        with pytest.raises(CancelledError):
            result(future)
    assert result(kept).shape == (1, 3, SIZE)
    engine.close(other)
    result(engine.forward(hidden(1, 1), first=0, last=4))
    assert engine.stats().cache_tokens_free == 4096
    assert engine.stats().sessions == 0


def test_a_cancelled_future_is_skipped(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session, other = engine.open(rows=1, first=0, last=4), engine.open(rows=1, first=0, last=4)
    span.gate = threading.Event()
    running = engine.step(other, hidden(1, 1), start=0)
    assert span.entered.wait(WAIT_S)
    step, dense = engine.step(session, hidden(1, 3), start=0), engine.forward(hidden(1, 1), first=0, last=4)
    assert step.cancel()
    assert dense.cancel()
    span.gate.set()
    result(running)
    assert result(engine.step(session, hidden(1, 2), start=0)).shape == (1, 2, SIZE)


def test_decode_goes_on_during_a_long_prefill(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span, max_batch_tokens=16)
    long, short = engine.open(rows=1, first=0, last=4), engine.open(rows=1, first=0, last=4)
    span.gate = threading.Event()
    prefill = engine.step(long, hidden(1, 600), start=0)
    assert span.entered.wait(WAIT_S)
    steps = [engine.step(short, hidden(1, 1), start=at) for at in range(10)]
    done: list[str] = []
    prefill.add_done_callback(lambda _: done.append("prefill"))
    steps[-1].add_done_callback(lambda _: done.append("decode"))
    forward = engine.forward(hidden(40, 4), first=0, last=4)
    span.gate.set()
    result(prefill)
    result(forward)
    assert done == ["decode", "prefill"]
    stats = engine.stats()
    assert (stats.prefill_tokens, stats.decode_tokens, stats.dense_tokens) == (600, 10, 160)
    assert stats.busy_s > 0
    assert len(stats.recent_step_s) == min(64, stats.batches)
    assert stats.waiting == 0


def test_a_message_that_cannot_be_taken_in_costs_only_its_sender(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session = engine.open(rows=1, first=0, last=4)
    unhashable: Any = [[]]
    with pytest.raises(TypeError):
        result(engine.admit(session, 8, prefix=Prefix(b"a", (unhashable,))))
    assert result(engine.admit(session, 8)) == 0
    assert engine.stats().queued == 0
    assert result(engine.step(session, hidden(1, 3), start=0)).shape == (1, 3, SIZE)


def test_others_may_compute_before_results_are_delivered(
    span: FragileSpan, start_engine: Start, tmp_path: Path
) -> None:
    engine, others = start_engine(span, turnstile=Turnstile(tmp_path)), Turnstile(tmp_path)
    entered = []

    def enter(_: Any) -> None:
        others.enter()
        entered.append(others._inside)
        others.leave()

    span.gate = threading.Event()
    session = engine.open(rows=1, first=0, last=4)
    futures = [engine.step(session, hidden(1, 3), start=0), engine.forward(hidden(1, 1), first=0, last=4)]
    for future in futures:
        future.add_done_callback(enter)
    span.gate.set()
    for future in futures:
        result(future)
    engine.stop()
    assert entered == [True, True]


def test_stopping_fails_what_waits(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    session = engine.open(rows=1, first=0, last=4)
    span.gate = threading.Event()
    running = engine.step(session, hidden(1, 1), start=0)
    assert span.entered.wait(WAIT_S)
    left = [engine.step(session, hidden(1, 1), start=1), engine.forward(hidden(1, 1), first=0, last=4)]
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    span.gate.set()
    stopper.join(WAIT_S)
    result(running)
    left += [engine.step(session, hidden(1, 1), start=1), engine.forward(hidden(1, 1), first=0, last=4)]
    for future in left:
        # what was received with the batch may have run yet
        error = future.exception(timeout=WAIT_S)
        assert error is None or isinstance(error, LeavingError)
    assert isinstance(left[-1].exception(), LeavingError)
    engine.close(session)
    with pytest.raises(LeavingError):
        engine.open(rows=1, first=0, last=4)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_sessions_get_what_they_would_get_alone(reference: Get, data: st.DataObject) -> None:
    acceleration = Acceleration(KERNEL, lambda _, step: step) if data.draw(st.booleans()) else None
    options: dict[str, Any] = {"cache_tokens": 160, "page_size": 2, "max_batch_tokens": 8}
    engine = Engine(reference("llama-gqa").span, acceleration=acceleration, **options)
    engine.start()
    try:
        runs = []
        for number in range(data.draw(st.integers(1, 5))):
            first, last = data.draw(st.sampled_from([(0, 4), (0, 2), (1, 4)]))
            session = engine.open(rows=1, first=first, last=last)
            inputs = hidden(1, 40, seed=number)
            futures = []
            at = 0
            for length in data.draw(st.lists(st.integers(1, 10), min_size=1, max_size=4)):
                at = max(0, at - data.draw(st.integers(0, 2)))
                futures.append((at, at + length, engine.step(session, inputs[:, at : at + length], start=at)))
                at += length
            runs.append((session, inputs, futures, data.draw(st.booleans())))
            if runs[-1][3]:
                engine.close(session)
        for session, inputs, futures, closed in runs:
            whole = result(engine.forward(inputs, first=session.first, last=session.last))
            for begin, end, future in futures:
                if closed and (future.cancelled() or future.exception(timeout=WAIT_S) is not None):
                    continue
                if isinstance(future.exception(timeout=WAIT_S), OutOfCacheError | BadRequestError):
                    continue
                torch.testing.assert_close(result(future), whole[:, begin:end], atol=1e-5, rtol=1e-5)
            engine.close(session)
        result(engine.forward(hidden(1, 1), first=0, last=4))
        assert engine.stats().cache_tokens_free == 160
    finally:
        engine.stop()


def test_sessions_are_let_in_as_far_as_all_of_them_fit_and_in_their_order(
    span: FragileSpan, start_engine: Start
) -> None:
    engine = start_engine(span, cache_tokens=40, page_size=4)
    sessions = [engine.open(rows=1, first=0, last=4) for _ in range(5)]
    assert result(engine.admit(sessions[0], 20)) == 0
    result(engine.step(sessions[0], hidden(1, 8), start=0))
    assert engine.stats().cache_tokens_free == 20
    waiting = [engine.admit(session, 24, wait=True) for session in sessions[1:3]]
    with pytest.raises(OutOfCacheError, match="20 tokens are free"):
        result(engine.admit(sessions[3], 16))  # it would fit, but others were here before
    late = engine.admit(sessions[4], 16, wait=True)
    assert waiting[0].cancel()
    assert not any(future.done() for future in (waiting[1], late))
    engine.close(sessions[0])
    assert result(waiting[1]) == 0
    assert result(late) == 0
    assert engine.stats().cache_tokens_free == 0
    result(engine.step(sessions[2], hidden(1, 24), start=0))
    result(engine.step(sessions[4], hidden(1, 16), start=0))
    for session in sessions:
        engine.close(session)
    huge = engine.open(rows=3, first=0, last=4)
    assert result(engine.admit(huge, 40, wait=True)) == 0, "alone, what could never fit for sure may try"
    engine.close(huge)
    result(engine.forward(hidden(1, 1), first=0, last=4))
    assert engine.stats().cache_tokens_free == 40


def test_free_cache_by_the_token_and_the_block(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span, cache_tokens=40, page_size=4)
    part = engine.open(rows=2, first=1, last=3, left_padding=[0, 1])
    result(engine.admit(part, 5))
    assert engine.stats().cache_block_tokens_free == 4 * 40 - 2 * (5 + 4)
    assert engine.stats().cache_tokens_free == 40 - 8 - 4
    engine.close(part)
    huge = engine.open(rows=3, first=0, last=4)
    result(engine.admit(huge, 40))  # more than there is, as its rows may share pages
    assert engine.stats().cache_block_tokens_free == 0
    engine.close(huge)
    result(engine.forward(hidden(1, 1), first=0, last=4))
    assert engine.stats().cache_block_tokens_free == 4 * 40


def test_a_session_begins_with_what_another_one_has_computed(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span, page_size=4)
    inputs = hidden(1, 30)
    names = [bytes([page]) for page in range(7)]
    expected = result(engine.forward(inputs, first=0, last=4))

    def open_with(context: bytes, first: int = 0, last: int = 4) -> tuple[Any, int]:
        session = engine.open(rows=1, first=first, last=last)
        return session, result(engine.admit(session, 40, prefix=Prefix(context, (tuple(names),))))

    one, position = open_with(b"a")
    assert position == 0
    result(engine.step(one, inputs[:, :18], start=0, names=[names[:4]]))
    result(engine.step(one, inputs[:, 18:], start=18, names=[names[4:]]))
    for begin in (28, 20, 9):
        other, position = open_with(b"a")
        assert position == 28
        torch.testing.assert_close(
            result(engine.step(other, inputs[:, begin:], start=begin)), expected[:, begin:], atol=1e-5, rtol=1e-5
        )
        engine.close(other)
    assert engine.stats().reused_tokens == 28 + 20 + 9
    for context, first, last in ((b"b", 0, 4), (b"a", 0, 2)):
        other, position = open_with(context, first, last)
        assert position == 0
        engine.close(other)
    third, _ = open_with(b"b")
    result(engine.step(third, inputs, start=0, names=[names[:3]]))  # names that don't fit the step are not believed
    assert open_with(b"b")[1] == 0
    result(engine.step(one, hidden(1, 4, seed=1), start=26))  # what others may find is not written to
    other, position = open_with(b"a")
    assert position >= 24
    torch.testing.assert_close(
        result(engine.step(other, inputs[:, position:], start=position)), expected[:, position:], atol=1e-5, rtol=1e-5
    )


def test_decode_of_many_and_a_piece_of_prefill_in_one_turn(span: FragileSpan, start_engine: Start) -> None:
    engine = start_engine(span)
    inputs = hidden(6, 21)
    expected = result(engine.forward(inputs, first=0, last=4))
    sessions = [engine.open(rows=1, first=0, last=4) for _ in range(6)]
    for row, session in enumerate(sessions[:5]):
        result(engine.step(session, inputs[row : row + 1, :20], start=0))
    span.gate = threading.Event()
    span.entered.clear()
    busy = engine.forward(hidden(1, 1), first=0, last=4)
    assert span.entered.wait(WAIT_S)
    batches = engine.stats().batches
    prefill = engine.step(sessions[5], inputs[5:], start=0)
    decodes = [engine.step(session, inputs[row : row + 1, 20:], start=20) for row, session in enumerate(sessions[:5])]
    span.gate.set()
    result(busy)
    torch.testing.assert_close(result(prefill), expected[5:], atol=1e-5, rtol=1e-5)
    for row, decode in enumerate(decodes):
        torch.testing.assert_close(result(decode), expected[row : row + 1, 20:], atol=1e-5, rtol=1e-5)
    assert engine.stats().batches <= batches + 3, "they ran together"
