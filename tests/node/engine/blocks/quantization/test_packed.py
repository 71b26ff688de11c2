"""Quantized checkpoints that stay packed: the weights are those that the checkpoint stands for, and so is what a node
computes with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from swarm.errors import ModelError
from swarm.model.loading import load_span
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.model.tensors import packed_blocks
from swarm.node.engine.blocks.quantization import Keep, Use, describe
from swarm.node.engine.blocks.quantization.blocks import QuantizedLinear
from swarm.node.engine.blocks.quantization.experts import QuantizedExperts
from swarm.node.engine.blocks.quantization.matrices.int4 import Int4Matrix
from swarm.node.engine.blocks.quantization.matrices.int8 import Int8Matrix
from swarm.node.engine.blocks.quantization.matrices.matrix import QuantizedMatrix
from swarm.node.engine.blocks.quantization.matrices.nf4 import NF4Matrix
from swarm.node.engine.blocks.quantization.matrices.stored import JoinedMatrix, StoredMatrix
from swarm.weights.checkpoint import SINGLE
from tests.models import make_checkpoint, make_config, tiny_model
from tests.swarm.weights.test_dequantize import (
    FORMATS,
    INT,
    Packer,
    Tensors,
    _ct_config,
    compressed,
    pack_words,
    quantized,
)

CPU = torch.device("cpu")


def gptq_channelwise_8bit(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1) / 127).half()
    numbers = (weight / scale.float()[:, None]).round().int() + 128
    stored = {
        f"{stem}.qweight": pack_words(numbers, 8).T.contiguous(),
        f"{stem}.qzeros": pack_words(torch.full((1, len(weight)), 127), 8),
        f"{stem}.scales": scale[None],
        f"{stem}.g_idx": torch.zeros(weight.shape[1], dtype=torch.int32),
    }
    return stored, (numbers - 128) * scale.float()[:, None]


def _ct(form: str, **weights: Any) -> tuple[dict[str, Any], Packer]:
    said = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in weights.items()}
    return _ct_config(form, **said), compressed(form, **weights)


INT4 = {**INT, "num_bits": 4}
MORE: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq-8-sym": ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, gptq_channelwise_8bit),
    "ct-int4-channel": _ct("pack-quantized", **INT4, strategy="channel"),
    "ct-int4-group-128": _ct("pack-quantized", **INT4, strategy="group", group_size=128),
    "ct-int8-packed": _ct("pack-quantized", **INT, num_bits=8, strategy="channel"),
    "ct-int8-group": _ct("int-quantized", **INT, num_bits=8, strategy="group", group_size=32),
    "ct-mxfp4": _ct(
        "mxfp4-pack-quantized",
        **{"type": "float", "symmetric": True, "num_bits": 4, "strategy": "group", "group_size": 32},
        scale_dtype=torch.uint8,
    ),
}
EVERY = FORMATS | MORE
KINDS: dict[str, type[QuantizedMatrix] | None] = {
    **dict.fromkeys(("nf4", "nf4-nested", "fp4"), NF4Matrix),
    **dict.fromkeys(("int8", "ct-int8", "gptq-8-sym", "ct-int8-packed"), Int8Matrix),
    **dict.fromkeys(("gptq-4-gptq-False", "gptq-4-gptq_v2-True", "awq", "ct-int4"), Int4Matrix),
    **dict.fromkeys(("ct-int4-asymmetric", "ct-int4-channel", "ct-int4-group-128"), Int4Matrix),
    **dict.fromkeys(("fp8", "ct-fp8", "ct-fp8-tensor", "ct-fp8-block", "ct-nvfp4", "ct-mxfp4"), StoredMatrix),
    "ct-int8-group": StoredMatrix,
    **dict.fromkeys(("gptq-3-gptq-True", "gptq-8-gptq_v2-False", "ct-int3"), None),
}


def _load(path: Path, dtype: torch.dtype, end: int, *, packed: bool = True) -> Span:
    keep = Keep(dtype, slow=True) if packed else None
    return load_span(resolve(str(path)), 0, end, dtype=dtype, device="cpu", keeper=keep)


def _size(path: Path, dtype: torch.dtype) -> int:
    source = resolve(str(path))
    block = build_skeleton(source, dtype, attention="eager").layers[0]
    return Keep(dtype, slow=True).size(block, packed_blocks(source)[0], CPU)


def _bytes(block: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _rounds_scales(name: str) -> bool:
    return KINDS[name] is NF4Matrix  # to bfloat16, as bitsandbytes itself does on a CPU


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_those_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    original = tiny_model("llama-gqa", dtype="bfloat16", layers=2, hidden=128)
    packed, plain = quantized(tmp_path, original, *EVERY[name])
    expected = _load(plain, torch.bfloat16, 1, packed=False).blocks[0]
    block = _load(packed, torch.bfloat16, 1).blocks[0]
    found = {name: module for name, module in block.named_modules() if isinstance(module, QuantizedLinear)}
    if KINDS[name] is None:
        assert not found
        return
    assert {type(module.matrix) for module in found.values()} == {KINDS[name]}
    assert len(found) == 7
    assert _bytes(block) <= _size(packed, torch.bfloat16) <= 1.09 * _bytes(block)
    assert _bytes(block) < 0.56 * _bytes(expected)
    for path, module in found.items():
        weight = expected.get_submodule(path).weight
        if _rounds_scales(name):
            torch.testing.assert_close(module.matrix.dequantize(torch.bfloat16), weight, rtol=2**-7, atol=0)
        else:
            assert torch.equal(module.matrix.dequantize(torch.bfloat16), weight)
        x = torch.randn(300, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        product = x.double() @ weight.double().T
        for rows in (1, 5, 300):
            error = (module(x[:rows]).double() - product[:rows]).norm() / product[:rows].norm()
            assert error < 6e-3, rows


def _reference(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


def _check_engine(span: Span, whole: PreTrainedModel, start_engine: Any, bound: float) -> None:
    """Prefill, decode, and a whole sequence, against the whole model."""
    ids = torch.randint(3, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    last: list[torch.Tensor] = []
    whole.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    hidden = whole(ids, output_hidden_states=True).hidden_states[0]
    engine = start_engine(span)
    session = engine.open(rows=5, first=0, last=span.end)
    parts = [engine.step(session, hidden[:, :38], start=0).result()]
    parts += [engine.step(session, hidden[:, at : at + 1], start=at).result() for at in (38, 39)]
    for found, expected in (
        (torch.cat(parts, dim=1), last[0]),
        (engine.forward(hidden[:1], first=0, last=span.end).result(), last[0][:1]),
    ):
        assert (found.double() - expected.double()).norm() / expected.double().norm() < bound


_IN_BFLOAT16 = ("gptq-4-gptq_v2-True", "awq", "ct-int4", "nf4-nested", "fp4", "int8", "fp8")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name, kind in KINDS.items() if kind not in (None, NF4Matrix)),
        *((name, torch.bfloat16) for name in _IN_BFLOAT16),
    ],
)
def test_the_engine_equals_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path, start_engine: Any) -> None:
    packed, plain = quantized(tmp_path, tiny_model("llama-gqa", layers=2, hidden=128), *EVERY[name])
    span = _load(packed, dtype, 2)
    assert any(isinstance(module, QuantizedMatrix) for module in span.blocks.modules())
    exact = dtype == torch.float32 and name != "ct-nvfp4"  # whose package multiplies scales in bfloat16
    _check_engine(span, _reference(plain, dtype), start_engine, 1e-5 if exact else 0.02)


@pytest.mark.parametrize("name", ["fp8", "gptq-4-gptq_v2-True", "ct-int4", "int8"])
def test_experts_stay_packed(name: str, tmp_path: Path, start_engine: Any) -> None:
    packed, plain = quantized(tmp_path, tiny_model("mixtral", layers=2), *EVERY[name])
    span = _load(packed, torch.float32, 2)
    experts = next(module for module in span.blocks.modules() if isinstance(module, QuantizedExperts))
    assert all(isinstance(matrix, JoinedMatrix) for matrix in experts.gate_up_proj)
    assert {type(matrix) for matrix in experts.down_proj} == {KINDS[name]}
    assert _bytes(span.blocks[0]) <= _size(packed, torch.float32)
    _check_engine(span, _reference(plain, torch.float32), start_engine, 1e-5)


def mxfp4(tmp_path: Path, original: Path) -> tuple[Path, Path]:
    """A gpt-oss with packed experts, and the same with what they mean."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    stored, meant = Tensors(), Tensors()
    for name, tensor in load_file(original / SINGLE).items():
        stored[name] = meant[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 122, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales).to(tensor.dtype).contiguous()
    paths = tmp_path / "packed", tmp_path / "plain"
    for path, tensors in zip(paths, (stored, meant), strict=True):
        shutil.copytree(original, path)
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    config = json.loads((paths[0] / "config.json").read_text())
    (paths[0] / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return paths


def test_experts_of_gpt_oss_stay_packed(tmp_path: Path, start_engine: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 320,
    }
    config = AutoConfig.for_model("gpt_oss", **sizes, **experts, initializer_range=0.3, dtype="float32")
    packed, plain = mxfp4(tmp_path, make_checkpoint(tmp_path / "original", config))
    span, whole = _load(packed, torch.float32, 2), _reference(plain, torch.float32)
    experts = next(module for module in span.blocks.modules() if isinstance(module, QuantizedExperts))
    matrices = [*experts.gate_up_proj, *experts.down_proj]
    assert all(isinstance(matrix, StoredMatrix) for matrix in matrices)
    assert torch.equal(
        experts.gate_up_proj[1].dequantize(torch.float32), whole.model.layers[0].mlp.experts.gate_up_proj[1].T
    )
    assert _bytes(span.blocks[0]) == _size(packed, torch.float32)
    _check_engine(span, whole, start_engine, 1e-5)


def test_gradients_go_through_what_is_packed(tmp_path: Path, start_engine: Any) -> None:
    packed, plain = quantized(tmp_path, tiny_model("llama-gqa", layers=2, hidden=128), *EVERY["gptq-4-gptq_v2-True"])
    hidden, grad = torch.randn(2, 7, 128), torch.randn(2, 7, 128)
    mine, theirs = (
        start_engine(_load(path, torch.float32, 2, packed=path == packed)).backward(hidden, grad, first=0, last=2)
        for path in (packed, plain)
    )
    assert (mine.result()[0] - theirs.result()[0]).norm() < 1e-5 * theirs.result()[0].norm()


def test_groups_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """Dequantized, they can be served."""
    packed, _ = quantized(tmp_path, tiny_model("llama-gqa", layers=2, hidden=128), *EVERY["gptq-4-gptq_v2-True"])
    tensors = load_file(packed / SINGLE)
    group = tensors["model.layers.0.mlp.up_proj.g_idx"]
    group[group.tolist().index(1)] = 0
    save_file(tensors, packed / SINGLE)
    with pytest.raises(ModelError, match=r"block 0 .*groups of different sizes: --quantization none takes them"):
        _load(packed, torch.float32, 1)
    _load(packed, torch.float32, 1, packed=False)


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_parts_that_do_not_fit_are_named(tmp_path: Path, part: str) -> None:
    packed, _ = quantized(tmp_path, tiny_model("llama-gqa", layers=2, hidden=128), *EVERY["fp8"])
    tensors = load_file(packed / SINGLE)
    name = f"model.layers.0.mlp.down_proj.{part}"
    save_file({**tensors, name: tensors[name][:3].clone()}, packed / SINGLE)
    with pytest.raises(ModelError, match="can't use block 0"):
        _load(packed, torch.float32, 1)


def _uses(path: Path, dtype: torch.dtype) -> dict[str, Use]:
    source = resolve(str(path))
    block = build_skeleton(source, dtype, attention="eager").layers[0]
    return Keep(dtype, slow=True).uses(block, packed_blocks(source)[0], CPU)


@pytest.mark.parametrize(
    ("name", "fast", "slow"),
    [
        ("awq", "served packed (int4, group 32)", "served packed (int4, group 32)"),
        (
            "fp8",
            "dequantized to bfloat16: no kernel here for float8_e4m3fn weights",
            "float8_e4m3fn weights served packed but dequantized at each use, which is slow: there is no kernel for "
            "them here (--quantization none takes more memory and is faster)",
        ),
        (
            "gptq-3-gptq-True",
            "dequantized to bfloat16: no kernel here for int32 weights",
            "dequantized to bfloat16: no kernel here for int32 weights",
        ),
    ],
)
def test_what_becomes_of_it_is_said(tmp_path: Path, name: str, fast: str, slow: str) -> None:
    path, _ = quantized(tmp_path, tiny_model("llama-gqa", dtype="bfloat16", layers=2, hidden=128), *EVERY[name])
    uses = _uses(path, torch.bfloat16)
    assert describe(uses, Keep(torch.bfloat16, slow=False), "bfloat16") == fast
    assert describe(uses, Keep(torch.bfloat16, slow=True), "bfloat16") == slow


PROGRAM = """
import json, sys, torch
from swarm.compute.memory import trim
from swarm.node.engine.blocks.quantization import Keep
from swarm.model.skeleton import build_skeleton
from swarm.model.loading import load_span
from swarm.model.tensors import packed_blocks
from swarm.model.source import resolve

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def measure(path):
    dtype = torch.bfloat16
    source, keep = resolve(path), Keep(dtype, slow=True)
    block = build_skeleton(source, dtype).layers[0]

    def peak():
        trim()
        before = memory("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
        span = load_span(source, 1, 4, dtype=dtype, device="cpu", keeper=keep)
        return memory("VmHWM") - before

    load_span(source, 0, 1, dtype=dtype, device="cpu", keeper=keep)  # what is needed once, whatever is loaded
    return [keep.size(block, packed_blocks(source)[0], torch.device("cpu")), min(peak() for _ in range(2))]

print(json.dumps([measure(path) for path in sys.argv[1:]]))
"""


def _large(path: Path, config: dict[str, Any], pack: Callable[[str, torch.Size], Tensors]) -> Path:
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 4, "intermediate": 4096, "layers": 4}
    made = make_config("llama-gqa", dtype="bfloat16", **sizes)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(made).state_dict()
    tensors = Tensors()
    for name, tensor in weights.items():
        stem, plain = name.removesuffix(".weight"), torch.ones(tensor.shape, dtype=torch.bfloat16)
        tensors |= pack(stem, tensor.shape) if name.endswith("proj.weight") else {name: plain}
    made.quantization_config = config
    made.save_pretrained(path)
    save_file(tensors, path / SINGLE)
    return path


def _random_gptq(stem: str, shape: torch.Size) -> Tensors:
    out, inputs = shape
    words = torch.randint(-(2**31), 2**31, (inputs // 8, out), dtype=torch.int64).to(torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (inputs // 128, out // 8), dtype=torch.int64).to(torch.int32)
    scales = torch.rand(inputs // 128, out).half()
    return {f"{stem}.qweight": words, f"{stem}.qzeros": zeros, f"{stem}.scales": scales}


def _random_fp8(stem: str, shape: torch.Size) -> Tensors:
    scale = torch.ones(shape[0] // 128, shape[1] // 128)
    return {f"{stem}.weight": torch.ones(shape, dtype=torch.float8_e4m3fn), f"{stem}.weight_scale_inv": scale}


def test_the_peak_of_loading_is_one_block_above_what_is_packed(tmp_path: Path) -> None:
    paths = (
        _large(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4}, _random_gptq),
        _large(tmp_path / "fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}, _random_fp8),
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        # the latter as in tests/swarm/model/test_memory.py: else what glibc keeps depends on how busy the machine is
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    dense = 2 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096)
    for path, (block, peak) in zip(paths, json.loads(done.stdout), strict=True):
        assert block < (0.3 if path.name == "gptq" else 0.51) * dense
        assert 3 * block <= peak + (1 << 20)
        assert peak <= 4 * block + (4 << 20), path
