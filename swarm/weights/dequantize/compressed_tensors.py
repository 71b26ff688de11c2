"""What compressed-tensors stores (llm-compressor, vLLM's models): integers, FP8 or FP4, whole or packed into words.

Source of the format: https://github.com/vllm-project/compressed-tensors. Schemes may differ between layers; each
tensor's own parts tell which it is, and the config only how many bits packed ones have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .format import Format, Headers, Parts
from .numbers import Integers, Layout
from .packing import by_blocks, fp8_to_float, power_of_two, unpack_fp4, unpack_words

_KNOWN = {
    "dense",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
}


def formats(config: Mapping[str, Any]) -> list[Format]:
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    weights = [group["weights"] for group in groups if group.get("weights")]
    kinds = {str(kind) for kind in [config.get("format"), *(group.get("format") for group in groups)] if kind}
    if unknown := sorted(kinds - _KNOWN):
        raise ValueError(f"format {unknown[0]!r}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"sparsity format {sparsity['format']!r}")
    blocks = {tuple(each["block_structure"]) for each in weights if each.get("block_structure")}
    if len(blocks) > 1:
        raise ValueError("blocks of several sizes")
    block = next(iter(blocks), None)
    bits = sorted({int(each.get("num_bits") or 8) for each in weights})

    optional = ("_zero_point", "_g_idx", "_shape")
    integers = partial(_integers, bits=bits)
    rows = dict.fromkeys(("", "_packed", "_scale", "_zero_point"), 0)
    return [
        Format(
            "",
            ("_scale",),
            optional,
            "",
            partial(_plain, block=block),
            _plain_layout,
            _plain_integers,
            rows,
            block[0] if block else None,
        ),
        Format(
            "_packed",
            ("_scale", "_shape"),
            optional[:2],
            "",
            lambda parts: integers(parts).weight(),
            partial(_layout, bits=bits),
            integers,
        ),
        Format("_packed", ("_scale", "_global_scale"), (), "", _nvfp4, rows=rows),
        Format("_packed", ("_scale",), (), "", _mxfp4, rows=rows),
    ]


def _plain(parts: Parts, block: tuple[int, ...] | None) -> torch.Tensor:
    weight, scale = parts[""], parts["_scale"]
    if weight.dtype.itemsize > 1:
        raise ValueError(f"its weight is {weight.dtype}, though it has scales")
    zero = parts["_zero_point"].float() if "_zero_point" in parts else None
    scale = power_of_two(scale) if scale.dtype is torch.uint8 else scale.float()
    numbers = weight.float() if weight.dtype is torch.int8 else fp8_to_float(weight)
    return _grouped(numbers, zero, scale, parts.get("_g_idx"), block)


def _plain_layout(headers: Headers, out: int, inputs: int) -> Layout | None:
    by_row = headers["_scale"].numel in (1, out) and "_zero_point" not in headers
    return Layout("int8", inputs) if by_row and headers[""].dtype is torch.int8 else None


def _plain_integers(parts: Parts) -> Integers:
    return Integers(parts[""], None, parts["_scale"].reshape(-1, 1))


def _integers(parts: Parts, bits: Sequence[int]) -> Integers:
    rows, columns = (int(size) for size in parts["_shape"])
    words, scale, group = parts["_packed"], parts["_scale"], parts.get("_g_idx")
    fitting = [each for each in bits if -(-columns * each // 32) == words.shape[1]]
    if len(fitting) != 1 or words.shape[0] != rows:
        raise ValueError(f"{list(words.shape)} words can't hold {rows} x {columns} numbers of {bits} bits")
    numbers = unpack_words(words, fitting[0])[:, :columns]  # plus half of what there is, as are the zeros
    if "_zero_point" in parts:
        zero = unpack_words(parts["_zero_point"].T.contiguous(), fitting[0]).T[:rows]
    else:
        zero = torch.full((1, 1), 1 << (fitting[0] - 1))
    ordered = group is not None and scale.ndim == 2 and scale.shape[1] > 1 and bool((group >= 0).all())
    return Integers(numbers, zero, scale, group.long() if ordered and group is not None else None)


def _layout(headers: Headers, out: int, inputs: int, bits: Sequence[int]) -> Layout | None:
    words, scale = headers["_packed"], headers["_scale"]
    group, zeros = inputs * out // scale.numel, "_zero_point" in headers
    if words.numel == out * -(-inputs // 8) and 4 in bits:
        short = scale.dtype is torch.bfloat16 and not zeros
        return Layout("int4", group, short, "_g_idx" in headers)
    eight = words.numel == out * -(-inputs // 4) and 8 in bits
    return Layout("int8", inputs) if eight and group >= inputs and not zeros else None


def _nvfp4(parts: Parts) -> torch.Tensor:
    scale = parts["_scale"].float() / parts["_global_scale"].float()
    return by_blocks(torch.Tensor.mul_, unpack_fp4(parts["_packed"]), scale)


def _mxfp4(parts: Parts) -> torch.Tensor:
    if parts["_packed"].dtype is not torch.uint8:
        raise ValueError("packed numbers without their shape")
    return by_blocks(torch.Tensor.mul_, unpack_fp4(parts["_packed"]), power_of_two(parts["_scale"]))


def _grouped(numbers: torch.Tensor, zero: torch.Tensor | None, scale: torch.Tensor, group: Any, block: Any) -> Any:
    """``(numbers - zero) * scale``, in place; ``group`` is that of each column, if there are such."""
    for operation, grid in ((torch.Tensor.sub_, zero), (torch.Tensor.mul_, scale)):
        if grid is not None:
            ordered = group is not None and grid.ndim == 2 and grid.shape[1] > 1 and bool((group >= 0).all())
            by_blocks(operation, numbers, grid, block=block, columns=group.long() if ordered else None)
    return numbers
