"""What compressed-tensors stores (llm-compressor, vLLM's models): integers, FP8 or FP4, whole or packed into words.

Source of the format: https://github.com/vllm-project/compressed-tensors. Schemes may differ between layers; each
tensor's own parts tell which it is, and the config only how many bits packed ones have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swarm.dequantize.format import Format, Parts
from swarm.dequantize.packing import power_of_two, spread, unpack_fp4, unpack_words

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

    def plain(parts: Parts) -> torch.Tensor:
        weight, scale = parts[""], parts["_scale"]
        if weight.dtype.itemsize > 1:
            raise ValueError(f"its weight is {weight.dtype}, though it has scales")
        numbers = weight.float()
        if (zero := parts.get("_zero_point")) is not None:
            numbers = _grouped(numbers, zero.float(), parts.get("_g_idx"), block, torch.Tensor.sub_)
        scale = power_of_two(scale) if scale.dtype is torch.uint8 else scale.float()
        return _grouped(numbers, scale, parts.get("_g_idx"), block, torch.Tensor.mul_)

    def integers(parts: Parts) -> torch.Tensor:
        rows, columns = (int(size) for size in parts["_shape"])
        words, scale, group = parts["_packed"], parts["_scale"].float(), parts.get("_g_idx")
        fitting = [each for each in bits if -(-columns * each // 32) == words.shape[1]]
        if len(fitting) != 1 or words.shape[0] != rows:
            raise ValueError(f"{list(words.shape)} words can't hold {rows} x {columns} numbers of {bits} bits")
        numbers = _signed(words, fitting[0])[:, :columns]
        if (packed := parts.get("_zero_point")) is not None:
            zero = _signed(packed.T.contiguous(), fitting[0]).T[:rows]
            numbers = _grouped(numbers, zero, group, None, torch.Tensor.sub_)
        return _grouped(numbers, scale, group, None, torch.Tensor.mul_)

    optional = ("_zero_point", "_g_idx", "_shape")
    return [
        Format("", ("_scale",), optional, "", plain),
        Format("_packed", ("_scale", "_shape"), optional[:2], "", integers),
        Format("_packed", ("_scale", "_global_scale"), (), "", _nvfp4),
        Format("_packed", ("_scale",), (), "", _mxfp4),
    ]


def _signed(words: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack_words(words, bits).float() - (1 << (bits - 1))


def _nvfp4(parts: Parts) -> torch.Tensor:
    numbers = unpack_fp4(parts["_packed"])
    return numbers.mul_(spread(parts["_scale"].float() / parts["_global_scale"].float(), numbers.shape))


def _mxfp4(parts: Parts) -> torch.Tensor:
    if parts["_packed"].dtype is not torch.uint8:
        raise ValueError("packed numbers without their shape")
    numbers = unpack_fp4(parts["_packed"])
    return numbers.mul_(spread(power_of_two(parts["_scale"]), numbers.shape))


def _grouped(numbers: torch.Tensor, by: torch.Tensor, group: torch.Tensor | None, block: Any, operation: Any) -> Any:
    """Applies a zero or a scale a group; with ``group``, that of each column."""
    if group is not None and by.ndim == 2 and by.shape[1] > 1 and bool((group >= 0).all()):
        return operation(numbers, by[:, group.long()])
    return operation(numbers, spread(by, numbers.shape, block))
