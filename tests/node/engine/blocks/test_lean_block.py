"""Which blocks are computed in few operations, and that those compute what transformers' own code does.

All that is tested of engines and nodes elsewhere is tested on such blocks, where a family has them.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.model.family_check.table import CASES
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.joined_linear import JoinedLinear
from swarm.node.engine.blocks.lean_block import LeanBlock
from swarm.node.engine.blocks.quantization import find_scheme
from swarm.node.engine.engine import Engine
from tests.models import make_checkpoint, tiny_model

LIKE_LLAMA = ("llama-gqa", "mistral-window", "qwen2", "qwen3")


def directory(like: str, where: Path) -> Path:
    case = next((case for case in CASES if case.label == like), None)
    return tiny_model(like, layers=2) if case is None else make_checkpoint(where / like, case.config())


def load(path: Path, dtype: torch.dtype, *, finished: bool) -> Span:
    return load_span(resolve(str(path)), 0, 2, dtype=dtype, device="cpu", finish=finish_block if finished else None)


def outputs(span: Span, rows: int) -> Tensor:
    """Of a prompt, and of some tokens more, one by one, for so many sessions at once."""
    engine = Engine(span, cache_tokens=1024, page_size=4)
    engine.start()
    sessions = [engine.open(rows=1, first=0, last=2) for _ in range(rows)]
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for start, count in ((0, 12), *((at, 1) for at in range(12, 20))):
        hidden = [torch.randn(1, count, span.hidden_size, generator=generator).to(span.dtype) for _ in sessions]
        steps = [engine.step(one, states, start=start) for one, states in zip(sessions, hidden, strict=True)]
        made.append(torch.cat([step.result() for step in steps]))
    engine.stop()
    return torch.cat(made, 1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("like", LIKE_LLAMA)
def test_blocks_like_llamas_are_lean_and_exact(like: str, dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    path = directory(like, tmp_path)
    plain, lean = (load(path, dtype, finished=finished) for finished in (False, True))
    assert all(isinstance(block.forward, LeanBlock) for block in lean.blocks), "has transformers changed?"
    theirs, mine = outputs(plain, rows), outputs(lean, rows)
    off = (mine - theirs).abs().max() / theirs.abs().max()
    assert off < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4"])
def test_quantized_blocks_are_lean_too(scheme: str) -> None:
    finish = partial(finish_block, scheme=find_scheme(scheme, torch.device("cpu"), torch.float32))
    path = tiny_model("llama-gqa", layers=2, hidden=128, intermediate=256)
    lean = load_span(resolve(str(path)), 0, 2, dtype=torch.float32, device="cpu", finish=finish)
    assert all(isinstance(block.forward, LeanBlock) for block in lean.blocks)
    mine = outputs(lean, 1)
    for block in lean.blocks:
        del block.forward
    torch.testing.assert_close(mine, outputs(lean, 1), atol=1e-4, rtol=0)


def test_what_only_looks_like_llama_keeps_its_own_code(tmp_path: Path) -> None:
    path = tiny_model("llama-gqa", layers=2, hidden_act="gelu")
    plain, finished = (load(path, torch.float32, finished=finished) for finished in (False, True))
    assert not any(isinstance(block.forward, LeanBlock) for block in finished.blocks)
    torch.testing.assert_close(outputs(finished, 1), outputs(plain, 1), atol=1e-4, rtol=0)


def test_a_block_is_gone_as_soon_as_nobody_uses_it() -> None:
    span = load(tiny_model("llama-gqa", layers=2), torch.float32, finished=True)
    seen = weakref.ref(span.blocks[0])
    gc.disable()
    try:
        del span
        assert seen() is None, "its weights would stay in memory until the garbage collector comes by"
    finally:
        gc.enable()


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_are_the_layers(bias: bool) -> None:
    path = tiny_model("llama-gqa", layers=2, attention_bias=bias)
    plain, joined = (load(path, torch.float32, finished=finished).blocks[0].self_attn for finished in (False, True))
    mine, theirs = ([getattr(each, name) for name in ("q_proj", "k_proj", "v_proj")] for each in (joined, plain))
    assert all(isinstance(layer, JoinedLinear) for layer in mine)
    for layer, reference in zip(mine, theirs, strict=True):
        assert torch.equal(layer.weight, reference.weight)
    inputs: list[Any] = [torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    # one after the other, one alone, one twice, and out of order
    for at, x in ((0, 0), (1, 0), (2, 0), (1, 1), (1, 1), (2, 0), (0, 1), (2, 1)):
        torch.testing.assert_close(mine[at](inputs[x]), theirs[at](inputs[x]), atol=1e-5, rtol=0)
    given = [inputs[0].clone().requires_grad_() for _ in range(2)]
    for layers, x in zip((mine, theirs), given, strict=True):
        sum(layer(x).square().sum() for layer in layers).backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, atol=1e-4, rtol=1e-4)
