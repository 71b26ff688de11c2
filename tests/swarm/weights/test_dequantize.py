"""Quantized checkpoints: every format's span equals that of the same model with its weights dequantized beforehand.

Checkpoints are made by the formats' own tools where these run on a CPU, else by a plain packer here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers import quantizer_finegrained_fp8

from swarm.errors import ModelError
from swarm.model.load_ends import load_ends
from swarm.model.loading import load_span
from swarm.model.open_checkpoint import open_checkpoint
from swarm.model.source import resolve
from swarm.weights.checkpoint import SINGLE
from swarm.weights.dequantize import quantization_of
from swarm.weights.dequantize.packing import by_blocks, unpack_words
from tests.models import tiny_model

Tensors = dict[str, torch.Tensor]
Packer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""From a weight's name without ``.weight`` and the weight: the tensors that are stored, and what they mean."""


def pack_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """``[rows, N]`` unsigned numbers to 32-bit words, the plain way: as one long number a row."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * at) for at, number in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * at)) & 0xFFFFFFFF for at in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def fp8(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 16, 16, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meaning = (stored.float() * scale[:, None, :, None]).view(rows, columns)
    return {f"{stem}.weight": stored.view(rows, columns), f"{stem}.weight_scale_inv": scale}, meaning


def bnb_4bit(kind: str, nested: bool) -> Packer:
    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        functional = pytest.importorskip("bitsandbytes").functional
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        stored = {f"{stem}.weight": packed}
        stored |= {f"{stem}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return stored, functional.dequantize_4bit(packed, state)

    return pack


def bnb_8bit(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    functional = pytest.importorskip("bitsandbytes").functional
    stored, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    extra = {f"{stem}.SCB": absmax, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {f"{stem}.weight": stored, **extra}, functional.int8_vectorwise_dequant(stored, absmax)


def _grouped(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers ``[out, in]``, zeros and scales ``[out, groups]``, asymmetric."""
    groups = weight.float().view(weight.shape[0], -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(1, 2**bits - 1).int()
    numbers = (groups / scale.float()[..., None]).round().int() + zero[..., None]
    return numbers.clamp(0, 2**bits - 1).view(weight.shape), zero, scale


def gptq(bits: int, form: str, act_order: int) -> Packer:
    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        inputs = weight.shape[1]
        group = torch.arange(inputs, dtype=torch.int32) // 32
        if act_order:
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
        order = torch.argsort(group, stable=True)
        numbers, zero, scale = _grouped(weight[:, order], bits, 32)
        numbers = numbers[:, torch.argsort(order)]
        stored = {
            f"{stem}.qweight": pack_words(numbers, bits).T.contiguous(),
            f"{stem}.qzeros": pack_words(zero.T - (1 if form == "gptq" else 0), bits),
            f"{stem}.scales": scale.T.contiguous(),
            f"{stem}.g_idx": group,
        }
        return stored, (numbers - zero[:, group]) * scale.float()[:, group]

    return pack


def awq(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, zero, scale = _grouped(weight, 4, 32)
    order = [at + place for at in range(0, weight.shape[0], 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    stored = {
        f"{stem}.qweight": pack_words(numbers.T[:, order], 4),
        f"{stem}.qzeros": pack_words(zero.T[:, order], 4),
        f"{stem}.scales": scale.T.contiguous(),
    }
    return stored, (numbers - zero.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)


def compressed(form: str, **weights: Any) -> Packer:
    def pack(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        package = pytest.importorskip("compressed_tensors", minversion="0.20")  # older ones lack some formats
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=form)
        parts = {"weight": weight.clone()}
        args, options = scheme.weights, {}
        if args.strategy == "tensor":
            low, high = weight.min()[None], weight.max()[None]
        elif args.strategy == "block":
            rows, columns = args.block_structure
            tiles = weight.view(weight.shape[0] // rows, rows, -1, columns)
            low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        else:
            tiles = weight.view(
                weight.shape[0], -1, args.group_size if (args.group_size or -1) > 0 else weight.shape[1]
            )
            low, high = tiles.amin(-1), tiles.amax(-1)
        if args.strategy == "tensor_group":
            parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
            options["global_scale"] = parts["weight_global_scale"]
        scale, zero = calculate_qparams(low, high, args, **options)
        parts["weight_scale"] = scale
        parts["weight_zero_point"] = zero
        compressor = package.compressors.BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(parts, scheme)
        meaning = compressor.decompress(stored, scheme)["weight"]
        return {f"{stem}.{name}": part for name, part in stored.items()}, meaning

    return pack


def _ct_config(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


INT = {"type": "int", "symmetric": True}
FLOAT = {"type": "float", "symmetric": True}
CT: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-int4": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}),
    "ct-int4-asymmetric": (
        "pack-quantized",
        {"type": "int", "symmetric": False, "num_bits": 4, "strategy": "group", "group_size": 32},
    ),
    "ct-int3": ("pack-quantized", {**INT, "num_bits": 3, "strategy": "channel"}),
    "ct-int8": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "ct-fp8": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "channel"}),
    "ct-fp8-tensor": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "tensor"}),
    "ct-fp8-block": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [16, 32]}),
    "ct-nvfp4": ("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb_4bit("nf4", nested=False)),
    "nf4-nested": ({"load_in_4bit": True}, bnb_4bit("nf4", nested=True)),
    "fp4": ({"quant_method": "bitsandbytes"}, bnb_4bit("fp4", nested=True)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_8bit),
    **{
        f"gptq-{bits}-{form}-{act_order}": (
            {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": form, "desc_act": act_order},
            gptq(bits, form, act_order),
        )
        for bits, form, act_order in (
            (4, "gptq", False),
            (4, "gptq_v2", True),
            (3, "gptq", True),
            (8, "gptq_v2", False),
        )
    },
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    **{name: (_ct_config(form, **weights), compressed(form, **weights)) for name, (form, weights) in CT.items()},
}


def quantized(tmp_path: Path, original: Path, config: dict[str, Any], pack: Packer) -> tuple[Path, Path]:
    """The model with the blocks' linear layers quantized, and the same with what these mean."""
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(original / SINGLE).items():
        if ".layers." in name and tensor.ndim == 2 and "gate.weight" not in name:
            parts, weight = pack(name.removesuffix(".weight"), tensor)
            stored |= {part: value.contiguous() for part, value in parts.items()}
            meant[name] = weight.to(tensor.dtype).contiguous()
        else:
            stored[name] = meant[name] = tensor
    for path, tensors in ((packed, stored), (plain, meant)):
        shutil.copytree(original, path)
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    raw = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return packed, plain


def _same(packed: Path, plain: Path) -> None:
    ours, theirs = resolve(str(packed)), resolve(str(plain))
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert ours.quantization is not None
    spans = [load_span(each, 1, 3, dtype=torch.bfloat16, device="cpu") for each in (ours, theirs)]
    expected = dict(spans[1].blocks.named_parameters())
    for name, parameter in spans[0].blocks.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(load_ends(ours).lm_head.weight, load_ends(theirs).lm_head.weight)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_span_is_the_dequantized_one(tmp_path: Path, name: str) -> None:
    config, pack = FORMATS[name]
    packed, plain = quantized(tmp_path, tiny_model("llama-gqa", dtype="bfloat16", layers=3), config, pack)
    assert (packed / SINGLE).stat().st_size != (plain / SINGLE).stat().st_size
    _same(packed, plain)


def test_experts_are_dequantized_and_stacked(tmp_path: Path) -> None:
    config, pack = FORMATS["fp8"]
    _same(*quantized(tmp_path, tiny_model("mixtral", dtype="bfloat16", layers=3), config, pack))


@pytest.mark.parametrize("like", ["llama-gqa", "mixtral"])
def test_fp8_as_transformers_reads_it(tmp_path: Path, like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks for accelerate, and makes no use of it here.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    packed, _ = quantized(tmp_path, tiny_model(like, dtype="bfloat16", layers=3), *FORMATS["fp8"])
    whole = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32)), dtype="bfloat16"
    )
    span = load_span(resolve(str(packed)), 1, 3, dtype=torch.bfloat16, device="cpu")
    for ours, theirs in zip(span.blocks, whole.model.layers[1:3], strict=True):
        expected = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 24, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 24, 2), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = Path(shutil.copytree(tiny_model("llama-gqa", dtype="bfloat16"), tmp_path / "model"))
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, path / SINGLE)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    ours = open_checkpoint(resolve(str(path))).read(name)
    assert ours.shape == (3, 64, 24)
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "with aqlm, which can't be read here .*awq, bitsandbytes.*original weights",
        ),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ: 5 bits in format 'gptq' can't be read"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ: 4 bits in version 'gemv' can't be read"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24' can't be read"),
        ({"quant_method": "gptq"}, "GPTQ: 'bits' can't be read"),
    ],
)
def test_what_cannot_be_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantization_of("x", config)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    packed, _ = quantized(tmp_path, tiny_model("llama-gqa", dtype="bfloat16", layers=3), *FORMATS["fp8"])
    tensors = load_file(packed / SINGLE)
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    save_file({**tensors, name: tensors[name][:3].clone()}, packed / SINGLE)
    with pytest.raises(ModelError, match=r"can't compute model.layers.1.mlp.down_proj.weight .*scales of shape"):
        load_span(resolve(str(packed)), 1, 2, dtype=torch.bfloat16, device="cpu")


@given(st.integers(1, 8), st.integers(1, 3), st.data())
def test_words(bits: int, rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    numbers = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.int32)
    assert torch.equal(unpack_words(pack_words(numbers, bits), bits)[:, :count], numbers)


def test_last_blocks_may_be_smaller() -> None:
    scale = torch.arange(6.0).view(2, 3)
    full = by_blocks(torch.Tensor.mul_, torch.ones(5, 10), scale, block=(4, 4))
    assert all(full[row, column] == scale[row // 4, column // 4] for row in range(5) for column in range(10))
    with pytest.raises(ValueError, match="don't fit"):
        by_blocks(torch.Tensor.mul_, torch.ones(5, 10), scale)


@given(st.integers(1, 2500), st.integers(1, 6), st.integers(1, 3), st.integers(1, 1200))
def test_blocks(rows: int, columns: int, wide: int, high: int) -> None:
    grid = torch.randn(-(-rows // high), -(-columns // wide))
    expected = grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    assert torch.equal(by_blocks(torch.Tensor.mul_, torch.ones(rows, columns), grid, block=(high, wide)), expected)
