"""A batch for which there is no memory is divided and tried again; the node and its sessions live."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.compute.memory import is_out_of_memory
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import Acceleration
from tests.models import make_checkpoint
from tests.node.engine.attention.paged_reference import KERNEL

Get = Callable[[str], Any]
Start = Callable[..., Engine]


class SmallSpan:
    """A span whose last block has memory for ``most`` tokens at a time."""

    def __init__(self, span: Any, most: int) -> None:
        self._span, self.most = span, most
        self.failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._span, name)

    def run(self, block: int, hidden: torch.Tensor, prepared: Any, batch: Any) -> torch.Tensor:
        if block == self._span.end - 1 and hidden.shape[0] * hidden.shape[1] > self.most:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        output: torch.Tensor = self._span.run(block, hidden, prepared, batch)
        return output


def hidden(rows: int, columns: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, size, generator=torch.Generator().manual_seed(seed))


def result(future: Future[Any]) -> Any:
    return future.result(timeout=30)


def test_sessions_side_by_side(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa").span
    span = SmallSpan(whole, most=7)
    engine = start_engine(span, cache_tokens=400)
    inputs = [hidden(2, 20, seed=seed) for seed in range(4)]
    expected = [result(start_engine(whole, cache_tokens=400).forward(each, first=0, last=4)) for each in inputs]
    sessions = [engine.open(rows=2, first=0, last=4) for _ in inputs]
    steps = [engine.step(session, each[:, :17], start=0) for session, each in zip(sessions, inputs, strict=True)]
    for step, output in zip(steps, expected, strict=True):
        torch.testing.assert_close(result(step), output[:, :17])
    for column in range(17, 20):
        part = slice(column, column + 1)
        steps = [engine.step(one, each[:, part], start=column) for one, each in zip(sessions, inputs, strict=True)]
        for step, output in zip(steps, expected, strict=True):
            torch.testing.assert_close(result(step), output[:, part])
    assert span.failed


def test_a_deterministic_session_keeps_its_bits(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa").span
    inputs = hidden(2, 150)

    def run(span: Any) -> torch.Tensor:
        engine = start_engine(span, cache_tokens=400, max_batch_tokens=256, deterministic=True)
        output: torch.Tensor = result(engine.step(engine.open(rows=2, first=0, last=4), inputs, start=0))
        return output

    span = SmallSpan(whole, most=70)
    assert torch.equal(run(span), run(whole))
    assert span.failed


def test_recurrent_states_go_back_too(start_engine: Start, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == "qwen3_next")
    whole = load_span(resolve(str(make_checkpoint(tmp_path, case.config()))), 0, 4, dtype=torch.float32, device="cpu")
    span = SmallSpan(whole, most=6)
    inputs = hidden(2, 20, whole.hidden_size)
    outputs = []
    for each in (span, whole):
        engine = start_engine(each, cache_tokens=400)
        session = engine.open(rows=2, first=0, last=4)
        outputs.append(
            [
                result(engine.step(session, inputs[:, :19], start=0)),
                result(engine.step(session, inputs[:, 19:], start=19)),
            ]
        )
    for divided, at_once in zip(*outputs, strict=True):
        torch.testing.assert_close(divided, at_once, atol=5e-4, rtol=1e-2)  # chunks of other sizes
    assert span.failed


def test_what_cannot_be_divided_fails_alone(reference: Get, start_engine: Start) -> None:
    span = SmallSpan(reference("llama-gqa").span, most=2)
    engine = start_engine(span, cache_tokens=400)
    small, large = engine.open(rows=2, first=0, last=4), engine.open(rows=3, first=0, last=4)
    steps = engine.step(large, hidden(3, 1), start=0), engine.step(small, hidden(2, 1), start=0)
    with pytest.raises(torch.OutOfMemoryError):
        result(steps[0])
    result(steps[1])
    assert engine.stats().failures == span.failed


@pytest.mark.parametrize("backward", [False, True])
def test_passes_without_a_session(reference: Get, start_engine: Start, backward: bool) -> None:
    whole = reference("llama-gqa").span
    inputs, grad = hidden(5, 4), hidden(5, 4, seed=1)

    def run(span: Any) -> Any:
        engine = start_engine(span, cache_tokens=400)
        if backward:
            return result(engine.backward(inputs, grad, first=0, last=4))[0]
        return result(engine.forward(inputs, first=0, last=4))

    span = SmallSpan(whole, most=9)
    torch.testing.assert_close(run(span), run(whole))
    assert span.failed


def test_a_recording_without_memory_is_tried_again(reference: Get, start_engine: Start) -> None:
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't be recorded")]
    tried = []

    def record(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
        tried.append(device)
        if errors:
            raise errors.pop(0)
        return step

    span = reference("llama-gqa").span
    engine = start_engine(span, cache_tokens=400, page_size=16, acceleration=Acceleration(KERNEL, record))
    session = engine.open(rows=1, first=0, last=4)
    inputs = hidden(1, 4)
    outputs = [result(engine.step(session, inputs[:, at : at + 1], start=at)) for at in range(4)]
    torch.testing.assert_close(torch.cat(outputs, 1), result(engine.forward(inputs, first=0, last=4)))
    assert len(tried) == 2


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("the block broke"))
