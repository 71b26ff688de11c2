"""Blocks that attend over the keys and values of another one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swarm.errors import BadRequestError, UsageError
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.model_source import ModelSource
from swarm.model.probe import KVGeometry
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine import executor
from swarm.node.engine.cache.kv_cache import KVCache
from swarm.node.engine.deterministic import check, make_deterministic
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import Acceleration
from swarm.node.engine.scheduling.messages import Prefix
from tests.models import make_checkpoint
from tests.node.engine.attention.paged_reference import KERNEL
from tests.node.engine.blocks.quantization.test_exact import close
from tests.node.engine.gpu.test_acceleration import Recorder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    case = next(case for case in CASES if case.label == "gemma4-e2b")
    return resolve(str(make_checkpoint(tmp_path_factory.mktemp("model"), case.config())))


@pytest.fixture(scope="module")
def span(source: ModelSource) -> Span:
    return load_span(source, 1, 5, dtype=torch.float32, device="cpu")  # 3 uses the cache of 1, 4 that of 2


def hidden(span: Span, columns: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, span.hidden_size, generator=torch.Generator().manual_seed(0))


def test_what_a_span_keeps(span: Span) -> None:
    small, large = KVGeometry(2, 16, 16), KVGeometry(2, 24, 24)
    assert span.kv == (small, large, small, large)
    cache = Engine(span, cache_tokens=64)._cache
    assert cache.keys[3] is cache.keys[1] is not cache.keys[2] is cache.keys[4]
    assert cache.values[3] is cache.values[1]
    assert cache.keys[4].shape == (2, 1, 64, 24)
    assert cache.nbytes == 4 * 64 * 2 * (2 * 16 + 2 * 24), "what two blocks share is there once"


def test_on_another_device_the_cache_is_kept_once_more() -> None:
    devices = [torch.device(name) for name in ("cpu", "meta", "meta")]
    shape = KVGeometry(1, 4, 4)
    cache = KVCache(
        start=2, tokens=16, page_size=4, kv=[shape] * 3, dtype=torch.float32, device=devices, sources={3: 2, 4: 2}
    )
    assert cache.keys[3] is cache.keys[4] is not cache.keys[2]
    assert cache.keys[3].is_meta


def test_parts_are_refused(source: ModelSource, span: Span) -> None:
    with pytest.raises(UsageError, match="blocks 0:3 can't be used without those around them: 1:5 share"):
        load_span(source, 0, 3, dtype=torch.float32, device="cpu")
    engine = Engine(span, cache_tokens=64)
    engine.start()
    with pytest.raises(BadRequestError, match="blocks 3:5 can't be used without"):
        engine.open(rows=1, first=3, last=5)
    with pytest.raises(BadRequestError, match="blocks 1:4 can't be used without"):
        engine.forward(hidden(span, 3), first=1, last=4).result(timeout=60)
    engine.stop()


def test_gradients_do_not_depend_on_what_is_kept(span: Span) -> None:
    given = hidden(span, 9, rows=2)
    grad = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))
    whole, parts = (executor.backward(span, given, grad, first=1, last=5, kept_tokens=kept)[0] for kept in (10**6, 1))
    torch.testing.assert_close(whole, parts)


def test_a_prefix_is_used_again(span: Span) -> None:
    engine = Engine(span, cache_tokens=256, page_size=4)
    engine.start()
    given = hidden(span, 11)
    outputs = []
    for names in ([[b"0", b"1"]], [[]]):
        session = engine.open(rows=1, first=1, last=5)
        begin = engine.admit(session, 11, prefix=Prefix(b"context", ((b"0", b"1"),))).result(timeout=60)
        outputs.append(engine.step(session, given[:, begin:], start=begin, names=names).result(timeout=60))
    assert [output.shape[1] for output in outputs] == [11, 3]
    close(outputs[1], outputs[0][:, 8:])
    engine.stop()


@pytest.mark.parametrize(
    ("max_dim", "devices", "played"), [(16, ["cpu"] * 4, 0), (24, ["cpu"] * 4, 2), (24, [*["cpu"] * 3, "cpu:0"], 1)]
)
def test_with_a_kernel(max_dim: int, devices: list[str], played: int, span: Span) -> None:
    """One that takes only the heads of some blocks leaves the others as they are. Steps are recorded where it takes
    all, and what is shared stays on one device; a first part may have run when that turns out."""
    recorder = Recorder()
    kernel = dataclasses.replace(KERNEL, max_dim=max_dim)
    placed = [torch.device(name) for name in devices]
    spread = dataclasses.replace(span, devices=tuple(placed), bases=dict.fromkeys(placed, span.bases[span.device]))
    given = hidden(span, 14, rows=2)
    outputs = []
    for one, acceleration in ((span, None), (spread, Acceleration(kernel, recorder, page_size=4))):
        engine = Engine(one, cache_tokens=256, acceleration=acceleration)
        engine.start()
        session = engine.open(rows=2, first=1, last=5)
        steps = [(0, 10), (10, 11), (11, 12), (12, 14)]
        parts = [engine.step(session, given[:, begin:end], start=begin).result(timeout=60) for begin, end in steps]
        outputs.append(torch.cat(parts, dim=1))
        engine.stop()
    close(*outputs)
    assert recorder.played == played


def test_deterministic(source: ModelSource) -> None:
    span = load_span(source, 0, 5, dtype=torch.float32, device="cpu", finish=make_deterministic)
    with torch.inference_mode():
        check(span)
