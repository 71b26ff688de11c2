"""What a GPU runs, run on a CPU: a plain kernel over pages, decode steps over static buffers, several devices."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarm.model.loading import load_span
from swarm.model.probe import KVGeometry
from swarm.model.source import resolve
from swarm.node.engine.attention.paged_attention import describe_rows
from swarm.node.engine.cache.kv_cache import KVCache, Row
from swarm.node.engine.cache.paged_kernel import torch_kernel
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu import static_decode
from swarm.node.engine.gpu.acceleration import Acceleration, accelerate, find_trouble, why_unrecorded
from swarm.node.engine.gpu.static_decode import StaticDecode, Step, fitting
from tests.models import tiny_model
from tests.node.engine.attention.paged_reference import KERNEL, varlen_attn
from tests.node.engine.blocks.quantization.test_exact import close, tokens

CPU = torch.device("cpu")
Get = Callable[[str], Any]
Start = Callable[..., Engine]
PAGED = ["llama-gqa", "llama-mha", "mistral-window", "mixtral", "falcon-180b", "falcon-7b"]


class Recorder:
    """Stands for CUDA's recording: warms up, as that does, and then repeats the step on whatever is in the buffers."""

    def __init__(self) -> None:
        self.recorded: list[torch.device] = []
        self.played = 0

    def __call__(self, device: torch.device, step: Step) -> Step:
        step()
        self.recorded.append(device)

        def play() -> None:
            self.played += 1
            step()

        return play


class Counting:
    """The reference kernel, which counts its calls by the most queries of a row."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        self.calls[args[5]] += 1
        return varlen_attn(*args, **options)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def kernel() -> Counting:
    return Counting()


@pytest.fixture
def acceleration(recorder: Recorder, kernel: Counting) -> Acceleration:
    return Acceleration(dataclasses.replace(KERNEL, call=kernel), recorder, page_size=4)


@pytest.mark.parametrize("like", [*PAGED, "bloom", "falcon-rw"])
def test_prefill_in_pieces_then_decode(
    like: str, reference: Get, start_engine: Start, acceleration: Acceleration, recorder: Recorder, kernel: Counting
) -> None:
    whole = reference(like)
    states = whole.blocks(tokens(2, 30))
    engine = start_engine(whole.span, max_batch_tokens=10, acceleration=acceleration)
    session = engine.open(rows=2, first=0, last=4)
    parts = [engine.step(session, states[0][:, :23], start=0).result()]
    parts += [engine.step(session, states[0][:, at : at + 1], start=at).result() for at in range(23, 28)]
    parts.append(engine.step(session, states[0][:, 28:], start=28).result())
    close(torch.cat(parts, dim=1), states[4])
    if like in PAGED:  # the others have ALiBi, and run as on a CPU
        assert recorder.played == 5
        assert kernel.calls[5] == 4 * 4  # prefill: pieces of five tokens a row, four blocks
    else:
        assert not recorder.played + kernel.calls.total()


@pytest.mark.parametrize("like", ["llama-gqa", "mistral-window"])
def test_sessions_of_different_lengths_decode_together(
    like: str, reference: Get, start_engine: Start, acceleration: Acceleration, recorder: Recorder, kernel: Counting
) -> None:
    whole = reference(like)
    states = [whole.blocks(tokens(1, 5 + 3 * number, seed=number)) for number in range(11)]
    engine = start_engine(whole.span, running=False, acceleration=acceleration)
    engine._running = True  # work that is queued before the thread starts is packed together for certain
    futures: list[list[Any]] = []
    for one in states:
        session = engine.open(rows=1, first=0, last=4)
        prompt = one[0].shape[1] - 3
        steps = [engine.step(session, one[0][:, :prompt], start=0)]
        steps += [engine.step(session, one[0][:, at : at + 1], start=at) for at in range(prompt, prompt + 3)]
        futures.append(steps)
    engine.start()
    for steps, one in zip(futures, states, strict=True):
        close(torch.cat([step.result() for step in steps], dim=1), one[4])
    assert recorder.played
    assert kernel.calls[1] < engine.stats().decode_tokens  # several rows in a call


def test_beams(reference: Get, start_engine: Start, acceleration: Acceleration, recorder: Recorder) -> None:
    whole = reference("llama-gqa")
    engine = start_engine(whole.span, acceleration=acceleration)
    ids = tokens(2, 7)
    session = engine.open(rows=2, first=0, last=4)
    engine.step(session, whole.inputs(ids), start=0).result()
    orders = [[1, 0], [0, 0, 1, 1], [3, 1, 0, 2], [2, 2, 2, 0], [1, 3], [0], [0, 0, 0], [2, 1]]
    for step, order in enumerate(orders):
        ids = torch.cat([ids[order], tokens(len(order), 1, seed=step)], dim=1)
        states = whole.blocks(ids)
        output = engine.step(session, states[0][:, -1:], start=ids.shape[1] - 1, hypo_ids=order).result()
        close(output, states[4][:, -1:])
    assert recorder.played == len(orders)
    assert len(recorder.recorded) < len(orders)


def test_left_padding_and_ranges_of_blocks(
    reference: Get, start_engine: Start, acceleration: Acceleration, recorder: Recorder
) -> None:
    whole = reference("llama-gqa")
    one, other = whole.blocks(tokens(1, 6)), whole.blocks(tokens(1, 2, seed=1))
    inputs = torch.cat([one[1], torch.cat([torch.full((1, 4, 64), torch.nan), other[1]], 1)])
    engine = start_engine(whole.span, acceleration=acceleration)
    session = engine.open(rows=2, first=1, last=3, left_padding=[0, 4])
    outputs = [engine.step(session, inputs[:, at : at + 1], start=at).result() for at in range(6)]
    close(torch.cat(outputs, dim=1), torch.cat([one[3], torch.cat([torch.zeros(1, 4, 64), other[3]], 1)]))
    assert recorder.played == 6


def test_a_span_on_two_devices(
    reference: Get, start_engine: Start, acceleration: Acceleration, recorder: Recorder
) -> None:
    whole = reference("llama-gqa")
    devices = [CPU, torch.device("cpu:0"), torch.device("cpu:0"), torch.device("cpu:0")]
    path = str(tiny_model("llama-gqa", layers=4))
    span = load_span(resolve(path), 0, 4, dtype=torch.float32, device=devices)
    assert list(span.runs(0, 4)) == [(devices[0], 0, 1), (devices[1], 1, 4)]
    assert list(span.runs(2, 3)) == [(devices[1], 2, 3)]
    assert span.bases[devices[0]] is not span.bases[devices[1]]
    states = whole.blocks(tokens(1, 12))
    for chosen in (Acceleration(), acceleration):
        engine = start_engine(span, acceleration=chosen)
        session = engine.open(rows=1, first=0, last=4)
        parts = [engine.step(session, states[0][:, :9], start=0).result()]
        parts += [engine.step(session, states[0][:, at : at + 1], start=at).result() for at in range(9, 12)]
        close(torch.cat(parts, dim=1), states[4])
    assert recorder.recorded[:2] == [devices[0], devices[1]]
    assert recorder.played == 2 * 3
    prompts = torch.randn(4, 1, 3, 64, generator=torch.Generator().manual_seed(0))
    grad = torch.ones_like(states[0])
    mine = engine.backward(states[0], grad, first=0, last=4, prompts=prompts).result()
    theirs = start_engine(whole.span).backward(states[0], grad, first=0, last=4, prompts=prompts).result()
    for left, right in zip(mine, theirs, strict=True):
        assert left is not None
        assert right is not None
        close(left, right)
    close(
        engine.forward(states[0], first=0, last=4, prompts=prompts).result(),
        start_engine(whole.span).forward(states[0], first=0, last=4, prompts=prompts).result(),
    )


def test_what_cannot_be_recorded_runs_unrecorded(
    reference: Get, start_engine: Start, acceleration: Acceleration, caplog: pytest.LogCaptureFixture
) -> None:
    whole = reference("llama-gqa")
    states = whole.blocks(tokens(1, 6))

    def broken(_device: torch.device, _step: Step) -> Step:
        raise RuntimeError("no recording today")

    engine = start_engine(whole.span, acceleration=dataclasses.replace(acceleration, record=broken))
    session = engine.open(rows=1, first=0, last=4)
    parts = [engine.step(session, states[0][:, at : at + 1], start=at).result() for at in range(6)]
    close(torch.cat(parts, dim=1), states[4])
    assert [record.getMessage() for record in caplog.records].count(
        "decode steps of blocks 0:4 run unrecorded, which is slower: RuntimeError('no recording today')"
    ) == 1


def test_recordings_are_bounded(
    reference: Get, acceleration: Acceleration, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_decode, "_MOST_RECORDINGS", 2)
    span = reference("llama-gqa").span
    options: Any = {"kernel": acceleration.kernel, "dtype": torch.float32, "device": CPU}
    cache = KVCache(start=0, tokens=400, page_size=4, kv=[KVGeometry(2, 16, 16)] * 4, **options)
    decode = StaticDecode(span, cache, recorder)
    rows = [Row(0, [page]) for page in range(65)]
    assert decode.run([(row, 1) for row in rows], torch.zeros(65, 64), 0, 4) is None
    assert decode.run([(rows[0], 2)], torch.zeros(2, 64), 0, 4) is None
    sizes = (1, 2, 1, 4, 1, 2)
    for size in sizes:
        output = decode.run([(row, 1) for row in rows[:size]], torch.zeros(size, 64), 0, 4)
        assert output is not None
        assert output.shape == (size, 64)
    assert len(recorder.recorded) == 4  # heights 1, 2 and 4, and 2 once more, which was left out for 4
    assert recorder.played == len(sizes)


def test_sizes_that_are_recorded() -> None:
    cache: Any = SimpleNamespace(page_size=256, pages=SimpleNamespace(count=6))
    assert fitting(1, 1, cache) == (1, 1)
    assert fitting(3, 256, cache) == (4, 1)
    assert fitting(17, 257, cache) == (24, 2)
    assert fitting(64, 3 * 256, cache) == (64, 4)
    assert fitting(64, 5 * 256, cache) == (64, 6)


def test_rows_for_the_kernel() -> None:
    rows = describe_rows([1, 3], [5, 3], [[7, 2], [4]], CPU)
    assert rows.query_ends.tolist() == [0, 1, 4]
    assert rows.key_ends.tolist() == [0, 5, 8]
    assert rows.lengths.tolist() == [5, 3]
    assert rows.table.tolist() == [[7, 2], [4, 0]]
    assert (rows.most_queries, rows.most_keys) == (3, 5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (3, 1)])
def test_a_kernel_is_tried_before_it_is_used(heads: int, kv_heads: int) -> None:
    def trial(call: Callable[..., torch.Tensor]) -> str | None:
        kernel = dataclasses.replace(KERNEL, call=call, page_size=8)
        return find_trouble(kernel, CPU, torch.float32, heads, kv_heads, 16)

    def without_causality(*args: Any, **options: Any) -> torch.Tensor:
        return varlen_attn(*args, **(options | {"window_size": (-1, -1), "num_splits": 1}))

    def blind_to_windows(*args: Any, **options: Any) -> torch.Tensor:
        return varlen_attn(*args, **(options | {"window_size": (-1, 0), "num_splits": 1}))

    def raising(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    assert trial(varlen_attn) is None
    for wrong in (without_causality, blind_to_windows):
        assert "off by" in (trial(wrong) or "")
    assert "Ampere" in (trial(raising) or "")


def test_torchs_kernel_is_called_as_it_wants_to_be() -> None:
    kernel = torch_kernel()
    if kernel is None:
        pytest.skip("this torch has no kernel for pages")
    ours = inspect.signature(varlen_attn).parameters
    theirs = inspect.signature(kernel.call).parameters
    assert list(ours) == list(theirs)
    assert [parameter.kind for parameter in ours.values()] == [parameter.kind for parameter in theirs.values()]
    assert kernel.suits(torch.bfloat16, 128, 128)
    for dtype, key_dim, value_dim in (
        (torch.float32, 128, 128),
        (torch.float16, 192, 128),
        (torch.float16, 512, 512),
        (torch.float16, 100, 100),
    ):
        assert not kernel.suits(dtype, key_dim, value_dim)


def test_an_older_torch_is_told_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)
    assert torch_kernel() is None
    assert "takes no block table" in caplog.text
    monkeypatch.delattr(varlen, "varlen_attn")
    assert torch_kernel() is None
    assert "has no varlen_attn" in caplog.text


def test_what_is_not_recorded(reference: Get) -> None:
    for like in ("llama-gqa", "mixtral", "bloom"):
        assert why_unrecorded(reference(like).span) is None
    assert accelerate(reference("llama-gqa").span) == Acceleration()

    span = reference("llama-gqa").span
    for kinds in ("dynamic", "longrope", {"full_attention": "default", "sliding_attention": "dynamic"}):
        base: Any = SimpleNamespace(rotary_emb=SimpleNamespace(rope_type=kinds))
        assert "rotary" in (why_unrecorded(dataclasses.replace(span, bases={CPU: base})) or "")
    span = reference("mixtral").span
    config = type(span.config)(**(span.config.to_dict() | {"experts_implementation": "eager"}))
    assert "experts" in (why_unrecorded(dataclasses.replace(span, config=config)) or "")
