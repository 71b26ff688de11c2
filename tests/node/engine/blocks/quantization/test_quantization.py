"""A node with quantized weights computes what transformers computes with the same weights, dequantized."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.errors import UsageError
from swarm.model.loading import load_span
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.quantization import SCHEMES, find_scheme, quantized_bytes, schemes_on
from swarm.node.engine.blocks.quantization.blocks import QuantizedLinear
from swarm.node.engine.blocks.quantization.experts import QuantizedExperts
from swarm.node.engine.blocks.quantization.matrices.int4 import _interleaved_rows
from swarm.node.engine.blocks.quantization.matrices.matrix import QuantizedMatrix
from tests.models import make_checkpoint, make_config, tiny_model

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(96, 64), (1088, 1024), (64, 5632)])
def test_products_are_those_of_the_dequantized_matrix(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    scheme = find_scheme(name, CPU, dtype)
    weight = torch.randn(shape).to(dtype)
    weight[3] = 0  # a row of an expert that was never trained
    matrix = scheme.make(weight)
    restored = matrix.dequantize(torch.float32)
    assert _error(restored, weight) < scheme.error
    assert not restored[3].any()
    assert matrix.stored_bytes == scheme.size(*shape, dtype)
    x = torch.randn(200, shape[1]).to(dtype)  # so many that the matrix is dequantized
    bound = 4e-3 if dtype == torch.bfloat16 else 1e-5
    whole = matrix(x)
    assert _error(whole, x.double() @ restored.double().T) < bound
    for rows in (1, 2, 5, 23, 24, 100):
        assert _error(matrix(x[:rows]), whole[:rows]) < 2 * bound
    assert matrix(x[:0]).shape == (0, shape[0])
    assert matrix(x.view(4, 50, -1)).shape == (4, 50, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_is_dequantized_the_same_where_the_layout_is_not_known(dtype: torch.dtype) -> None:
    matrix = find_scheme("int4", CPU, dtype).make(torch.randn(128, 160).to(dtype))
    assert _interleaved_rows() > 0, "this CPU's layout is not known: dequantizing is slow here, and not tested"
    torch.testing.assert_close(
        matrix.dequantize(dtype), matrix.multiply(torch.eye(160, dtype=dtype)).T, atol=2e-2, rtol=0
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_dequantized_layer(name: str) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.Linear(64, 7)).requires_grad_(False)
    finish_block(block, find_scheme(name, CPU, torch.float32))
    assert isinstance(block[0], QuantizedLinear)
    assert not isinstance(block[3], QuantizedLinear)  # of a shape that no scheme takes
    plain = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.Linear(64, 7)).requires_grad_(False)
    for mine, theirs in zip(block, plain, strict=True):
        if isinstance(mine, QuantizedLinear):
            theirs.weight.data = mine.matrix.dequantize(torch.float32)
            theirs.bias.data = mine.bias
    plain[3] = block[3]
    if name == "nf4":
        assert not isinstance(block[2], QuantizedLinear)  # rows of 96 are not groups of 64
        plain[2] = block[2]
    inputs = [torch.linspace(-2, 2, 5 * 64).view(5, 64).requires_grad_() for _ in range(2)]
    for network, x in zip((block, plain), inputs, strict=True):
        network(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("like", ["llama-gqa", "mixtral", "falcon-7b", "bloom"])
@pytest.mark.parametrize("name", SCHEMES)
def test_sizes_are_known_before_loading(name: str, like: str, dtype: torch.dtype) -> None:
    scheme = find_scheme(name, CPU, dtype)
    path = tiny_model(like, dtype="float32", hidden=128)
    source = resolve(str(path))
    expected = quantized_bytes(build_skeleton(source, dtype, attention="eager").layers[0], scheme)
    sizes: list[int] = []

    def finish(block: nn.Module) -> None:
        finish_block(block, scheme)
        tensors = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
        packed = [module for module in block.modules() if hasattr(module, "packed") and hasattr(module, "bias")]
        sizes.append(
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            + sum(4 * module.in_features * module.out_features for module in packed)
        )

    load_span(source, 0, 1, dtype=dtype, device="cpu", finish=finish)
    assert sizes == [expected]
    assert expected < {"int8": 0.7, "nf4": 0.45, "int4": 0.45}[name] * quantized_bytes(
        build_skeleton(source, dtype, attention="eager").layers[0], None
    )


def _reference(path: Path, span: Any, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' whole model with the weights of ``span``, dequantized."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    for mine, theirs in zip(span.blocks, layers, strict=True):
        _restore(mine, theirs, dtype)
    return model


def _restore(mine: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    for name, module in mine.named_modules():
        if isinstance(module, QuantizedLinear):
            theirs.get_submodule(name).weight.data = module.matrix.dequantize(dtype)  # type: ignore[assignment]
        elif isinstance(module, QuantizedExperts):
            for projection in ("gate_up_proj", "down_proj"):
                stacked = [matrix.dequantize(dtype) for matrix in module.get_submodule(projection).children()]  # type: ignore[operator]
                getattr(theirs.get_submodule(name), projection).data = torch.stack(stacked)


@pytest.mark.parametrize("like", ["llama-gqa", "mixtral", "falcon-180b", "bloom"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_engine_equals_the_whole_model(name: str, like: str, start_engine: Any) -> None:
    path, scheme = tiny_model(like, layers=4), find_scheme(name, CPU, torch.float32)
    span = load_span(
        resolve(str(path)), 0, 4, dtype=torch.float32, device="cpu", finish=lambda block: finish_block(block, scheme)
    )
    model = _reference(path, span, torch.float32)
    assert any(isinstance(module, QuantizedMatrix) for module in span.blocks.modules())
    assert any(isinstance(module, QuantizedExperts) for module in span.blocks.modules()) == (like == "mixtral")
    ids = torch.randint(3, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    last: list[torch.Tensor] = []
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out))
    hidden = model(ids, output_hidden_states=True).hidden_states[0]
    expected = last[0]

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=2e-5 * max(1.0, float(expected.abs().max())), rtol=0)

    engine = start_engine(span)
    session = engine.open(rows=5, first=0, last=4)
    parts = [engine.step(session, hidden[:, :38], start=0).result()]
    parts += [engine.step(session, hidden[:, at : at + 1], start=at).result() for at in (38, 39)]
    close(torch.cat(parts, dim=1), expected)
    close(engine.forward(hidden[:1], first=0, last=4).result(), expected[:1])

    leaf = hidden[:2].clone().requires_grad_()
    last.clear()
    model(inputs_embeds=leaf) if like != "bloom" else None
    if like != "bloom":  # it puts a norm behind its embeddings
        last[0].square().sum().backward()
        grad, _ = engine.backward(hidden[:2], 2 * last[0].detach(), first=0, last=4).result()
        close(grad, leaf.grad)


def test_what_can_not_be_done_is_said() -> None:
    with pytest.raises(UsageError, match="not one of checkpoint, packed, none, auto, int8, nf4, int4"):
        find_scheme("int3", CPU, torch.float32)
    with pytest.raises(UsageError, match="not on mps"):
        find_scheme("int8", torch.device("mps"), torch.float32)
    wrong = next(scheme for scheme in schemes_on(CPU) if scheme.name == "int8")
    with pytest.raises(UsageError, match=r"int4 can't be computed .*wrong results"):
        from swarm.node.engine.blocks.quantization import schemes

        schemes._check(schemes.Scheme("int4", wrong.make, wrong.size, wrong.fits, error=1e-6), CPU, torch.float32)


PROGRAM = """
import gc, json, sys, torch
from swarm.compute.memory import trim
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.quantization import find_scheme, quantized_bytes
from swarm.model.skeleton import build_skeleton
from swarm.model.loading import load_span
from swarm.model.source import resolve

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def measure(path, name, slack):
    dtype = torch.bfloat16
    source, scheme = resolve(path), find_scheme(name, torch.device("cpu"), dtype)
    block = build_skeleton(source, dtype).layers[0]

    def load(start, end):
        finish = lambda block: finish_block(block, scheme)
        return load_span(source, start, end, dtype=dtype, device="cpu", finish=finish)

    def peak():
        gc.collect()  # of the run before, which would make room for this one
        trim()
        before = memory("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
        span = load(1, 5)
        return memory("VmHWM") - before

    load(0, 1)  # what is needed once, whatever is loaded
    # the least of up to nine: on a busy machine a thread that reads may be ahead of the one that quantizes; but none
    # that found room that a run before had left
    quantized, plain, peaks = 4 * quantized_bytes(block, scheme), quantized_bytes(block, None), []
    for _ in range(9):
        peaks += [found for found in [peak()] if found >= quantized]
        if peaks and min(peaks) <= quantized + plain + int(slack):
            break
    return [quantized, plain, min(peaks)]

print(json.dumps([measure(*run) for run in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3])]))
"""


def test_the_peak_of_loading_is_one_block_above_what_is_loaded(tmp_path: Path) -> None:
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 4, "layers": 5}
    llama = make_checkpoint(tmp_path / "l", make_config("llama-gqa", dtype="bfloat16", intermediate=4096, **sizes))
    mixtral = make_checkpoint(tmp_path / "m", make_config("mixtral", dtype="bfloat16", intermediate=1024, **sizes))
    # experts that are stacked while they are read: one projection of all of them more
    runs = [(llama, "int8", 16 << 20), (mixtral, "nf4", 32 << 20), (llama, "int4", 16 << 20)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(part) for run in runs for part in run)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for run, (quantized, block, peak) in zip(runs, json.loads(done.stdout), strict=True):
        assert quantized < 2.1 * block, run  # so that one block more would show
        assert quantized <= peak <= quantized + block + run[2], run
