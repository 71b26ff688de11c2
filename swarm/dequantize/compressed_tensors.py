"""What compressed-tensors stores (llm-compressor, vLLM's models): integers, FP8 or FP4, whole or packed into words.

Source of the format: https://github.com/vllm-project/compressed-tensors. Schemes may differ between layers; each
tensor's own parts tell which it is, and the config only how many bits packed ones have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swarm.dequantize.format import Format, Parts
from swarm.dequantize.packing import by_blocks, power_of_two, unpack_fp4, unpack_words

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
        zero = parts["_zero_point"].float() if "_zero_point" in parts else None
        scale = power_of_two(scale) if scale.dtype is torch.uint8 else scale.float()
        return _grouped(weight.float(), zero, scale, parts.get("_g_idx"), block)

    def integers(parts: Parts) -> torch.Tensor:
        rows, columns = (int(size) for size in parts["_shape"])
        words, scale, group = parts["_packed"], parts["_scale"].float(), parts.get("_g_idx")
        fitting = [each for each in bits if -(-columns * each // 32) == words.shape[1]]
        if len(fitting) != 1 or words.shape[0] != rows:
            raise ValueError(f"{list(words.shape)} words can't hold {rows} x {columns} numbers of {bits} bits")
        numbers = _signed(words, fitting[0])[:, :columns]
        packed = parts.get("_zero_point")
        zero = None if packed is None else _signed(packed.T.contiguous(), fitting[0]).T[:rows]
        return _grouped(numbers, zero, scale, group, None)

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
