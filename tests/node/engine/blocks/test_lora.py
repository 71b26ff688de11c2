"""Sessions with different LoRA adapters in one batch compute what PEFT computes on the whole model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from swarm.errors import BadRequestError, ModelError
from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.adapters.checkpoint import AdapterCheckpoint, open_adapter
from swarm.node.adapters.config import AdapterSpec
from swarm.node.engine.adapters import put_adapters
from swarm.node.engine.attention.adapter_tokens import adapter_tokens
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.quantization import find_scheme
from swarm.node.engine.blocks.quantization.blocks import QuantizedLinear
from swarm.node.engine.deterministic import check, make_deterministic
from swarm.node.engine.engine import Engine
from swarm.node.engine.gpu.acceleration import Acceleration
from swarm.node.engine.scheduling.messages import Prefix
from tests.adapters import make_adapter, whole_with
from tests.models import make_checkpoint, tiny_model
from tests.node.engine.attention.paged_reference import KERNEL

Start = Callable[..., Engine]
CPU = torch.device("cpu")
TARGETS = {
    "llama-gqa": "all-linear",
    "falcon-180b": ["query_key_value", "dense_4h_to_h"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "mixtral": ["q_proj", "o_proj"],
}
LAYERS = 2
WHICH = ("ada", "bob", "")


def adapters_of(like: str, dtype: str) -> tuple[Path, dict[str, Path]]:
    path, targets = tiny_model(like, dtype=dtype, layers=LAYERS), TARGETS[like]
    return path, {
        "ada": make_adapter(path, "ada", r=4, target_modules=targets),
        "bob": make_adapter(
            path,
            "bob",
            seed=1,
            r=2,
            lora_alpha=5,
            target_modules=targets[:1] if targets != "all-linear" else ["q_proj"],
        ),
    }


def open_adapters(path: Path, found: dict[str, Path]) -> list[AdapterCheckpoint]:
    skeleton = build_skeleton(resolve(str(path)), torch.float32, attention="eager")
    return [open_adapter(AdapterSpec(name, str(where)), skeleton) for name, where in found.items()]


def make_span(path: Path, found: dict[str, Path], *, scheme: str | None = None, deterministic: bool = False) -> Span:
    source = resolve(str(path))
    kind = None if scheme is None else find_scheme(scheme, CPU, source.dtype)
    finish = partial(finish_block, scheme=kind, deterministic=deterministic)
    span = load_span(source, 0, source.num_blocks, dtype=source.dtype, device="cpu", finish=finish)
    put_adapters(span, open_adapters(path, found))
    return span


class Whole:
    """PEFT's whole model, of which the blocks' inputs and outputs are seen."""

    def __init__(self, peft: PeftModel) -> None:
        self.peft = peft
        base: nn.Module = peft.get_base_model()
        self.layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))

    def blocks(self, hidden: Tensor, adapter: str) -> Tensor:
        """``hidden`` ``[rows, T, H]`` through all blocks with an adapter or none; differentiable."""
        seen: list[Tensor] = []
        first = self.layers[0].register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        last = self.layers[-1].register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            if adapter:
                self.peft.set_adapter(adapter)
                self.peft(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64))
            else:
                with self.peft.disable_adapter():
                    self.peft(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64))
        finally:
            first.remove()
            last.remove()
        return seen[0]


@functools.cache
def case(like: str, dtype: str) -> tuple[Span, Whole]:
    path, found = adapters_of(like, dtype)
    return make_span(path, found), Whole(whole_with(path, found, dtype=getattr(torch, dtype)))


def numbers(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns, 64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """As near as the dtype lets them be."""
    bound = 2e-5 if expected.dtype == torch.float32 else 2e-2
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < bound, error


def run_together(engine: Engine, inputs: dict[int, tuple[str, Tensor]]) -> dict[int, Tensor]:
    """All sessions' prompts, and then token by token, packed together for certain."""
    engine._running = True  # work that is queued before the thread starts
    steps: dict[int, list[Any]] = {}
    for number, (adapter, hidden) in inputs.items():
        session = engine.open(rows=hidden.shape[0], first=0, last=LAYERS, adapter=adapter)
        prompt = hidden.shape[1] - 3
        steps[number] = [engine.step(session, hidden[:, :prompt], start=0)]
        steps[number] += [
            engine.step(session, hidden[:, at : at + 1], start=at) for at in range(prompt, hidden.shape[1])
        ]
    engine.start()
    outputs = {number: torch.cat([step.result(60) for step in many], dim=1) for number, many in steps.items()}
    assert engine.stats().batches < sum(map(len, steps.values())) / 2
    return outputs


@pytest.mark.parametrize(("like", "dtype"), [*((like, "float32") for like in TARGETS), ("llama-gqa", "bfloat16")])
def test_one_batch(like: str, dtype: str, start_engine: Start) -> None:
    span, whole = case(like, dtype)
    inputs = {n: (WHICH[n % 3], numbers(1 + n % 2, 6 + n, n, span.dtype)) for n in range(7)}
    found = run_together(start_engine(span, running=False, adapters=WHICH[:2]), inputs)
    with torch.no_grad():
        for number, (adapter, hidden) in inputs.items():
            close(found[number], whole.blocks(hidden, adapter))
        hidden = inputs[0][1]
        assert not torch.allclose(whole.blocks(hidden, "ada"), whole.blocks(hidden, "bob"), atol=0.1)
        assert not torch.allclose(whole.blocks(hidden, "ada"), whole.blocks(hidden, ""), atol=0.1)


@pytest.mark.parametrize("like", TARGETS)
@pytest.mark.parametrize("adapter", WHICH)
def test_forward_and_backward(like: str, adapter: str, start_engine: Start) -> None:
    span, whole = case(like, "float32")
    engine = start_engine(span, adapters=WHICH[:2])
    hidden, grad = numbers(2, 9, 3, span.dtype).requires_grad_(), numbers(2, 9, 4, span.dtype)
    output = whole.blocks(hidden, adapter)
    output.backward(grad)
    with torch.no_grad():
        close(engine.forward(hidden, first=0, last=LAYERS, adapter=adapter).result(60), output)
    assert hidden.grad is not None
    close(engine.backward(hidden.detach(), grad, first=0, last=LAYERS, adapter=adapter).result(60)[0], hidden.grad)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_beside_quantized_weights(scheme: str, start_engine: Start) -> None:
    path, found = adapters_of("llama-gqa", "float32")
    span = make_span(path, found, scheme=scheme)
    whole = Whole(whole_with(path, found))
    for block, layer in zip(span.blocks, whole.layers, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, QuantizedLinear):
                layer.get_submodule(name).base_layer.weight.data = module.matrix.dequantize(torch.float32)
    inputs = {n: (WHICH[n], numbers(1, 6 + n, n, span.dtype)) for n in range(3)}
    outputs = run_together(start_engine(span, running=False, adapters=WHICH[:2]), inputs)
    with torch.no_grad():
        for number, (adapter, hidden) in inputs.items():
            close(outputs[number], whole.blocks(hidden, adapter))
    engine = start_engine(span, adapters=WHICH[:2])
    hidden, grad = numbers(2, 9, 3, span.dtype).requires_grad_(), numbers(2, 9, 4, span.dtype)
    whole.blocks(hidden, "ada").backward(grad)
    assert hidden.grad is not None
    close(engine.backward(hidden.detach(), grad, first=0, last=LAYERS, adapter="ada").result(60)[0], hidden.grad)


@pytest.mark.parametrize(("like", "dtype"), [("llama-gqa", "float32"), ("mixtral", "bfloat16")])
def test_the_same_bits_in_any_company(like: str, dtype: str, start_engine: Start) -> None:
    span = make_span(*adapters_of(like, dtype), deterministic=True)
    for block in span.blocks:
        make_deterministic(block)
    check(span, WHICH[:2])
    mine = "ada", numbers(2, 30, 0, span.dtype)
    (alone,) = run_alone(start_engine(span, deterministic=True, adapters=WHICH[:2]), mine)
    crowd = {n: (WHICH[n % 3], numbers(1, 5 + 7 * n, n, span.dtype)) for n in range(1, 6)}
    together = run_together(
        start_engine(span, running=False, deterministic=True, adapters=WHICH[:2]), {**crowd, 9: mine}
    )
    assert torch.equal(together[9], alone)


def run_alone(engine: Engine, *inputs: tuple[str, Tensor]) -> list[Tensor]:
    outputs = []
    for adapter, hidden in inputs:
        session = engine.open(rows=hidden.shape[0], first=0, last=LAYERS, adapter=adapter)
        cuts = [0, hidden.shape[1] - 3, *range(hidden.shape[1] - 2, hidden.shape[1] + 1)]
        steps = [engine.step(session, hidden[:, at:to], start=at).result(60) for at, to in itertools.pairwise(cuts)]
        outputs.append(torch.cat(steps, dim=1))
    return outputs


def test_recorded_steps_are_for_those_without(start_engine: Start) -> None:
    span, whole = case("llama-gqa", "float32")
    played: list[int] = []

    def record(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
        return lambda: (step(), played.append(1))[0]

    engine = start_engine(span, acceleration=Acceleration(KERNEL, record, page_size=4), adapters=WHICH[:2])
    hidden = numbers(1, 8, 0, span.dtype)
    with torch.no_grad():
        close(run_alone(engine, ("ada", hidden))[0], whole.blocks(hidden, "ada"))
        assert not played
        close(run_alone(engine, ("", hidden))[0], whole.blocks(hidden, ""))
        assert played


def test_prefixes_are_kept_apart(start_engine: Start) -> None:
    """Even if a client says that the context is the same."""
    span, _ = case("llama-gqa", "float32")
    engine = start_engine(span, page_size=4, adapters=WHICH[:2])
    names = [[bytes([page]) * 16 for page in range(2)]]
    prefix = Prefix(b"context", tuple(map(tuple, names)))
    hidden = numbers(1, 8, 0, span.dtype)
    for expected in (0, 8):
        for adapter in WHICH:
            session = engine.open(rows=1, first=0, last=LAYERS, adapter=adapter)
            assert engine.admit(session, 16, prefix=prefix).result(60) == expected
            engine.step(session, hidden, start=0, names=names).result(60)
            engine.close(session)


def test_unknown_adapters_are_refused(start_engine: Start) -> None:
    span, _ = case("llama-gqa", "float32")
    engine = start_engine(span, adapters=WHICH[:2])
    with pytest.raises(BadRequestError, match="'eve' is not served"):
        engine.open(rows=1, first=0, last=1, adapter="eve")
    with pytest.raises(BadRequestError, match="'eve' is not served"):
        engine.forward(numbers(1, 2, 0, span.dtype), first=0, last=1, adapter="eve").result(60)


@pytest.mark.parametrize(
    ("model_type", "targets", "message"),
    [
        ("deepseek_v3", ["q_a_proj", "kv_b_proj"], "kv_b_proj in block 0, and its weights are used in another way"),
        ("qwen3_next", ["out_proj"], "part of a layer with recurrent states"),
    ],
)
def test_layers_that_cannot_have_one(model_type: str, targets: list[str], message: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, next(case for case in CASES if case.model_type == model_type).config())
    with pytest.raises(ModelError, match=message):
        make_span(path, {"ada": make_adapter(path, model_type, r=2, target_modules=targets)})


@given(st.lists(st.tuples(st.sampled_from(WHICH), st.integers(1, 5))))
def test_tokens_of_adapters(counts: list[tuple[str, int]]) -> None:
    wanted = [adapter for adapter, count in counts for _ in range(count)]
    found = adapter_tokens(counts)
    if found:
        assert [part.adapter for part in found for _ in range(part.begin, part.end)] == wanted
        assert all(before.end == after.begin for before, after in itertools.pairwise(found))
        assert all(before.adapter != after.adapter for before, after in itertools.pairwise(found))
    else:
        assert not any(wanted)
