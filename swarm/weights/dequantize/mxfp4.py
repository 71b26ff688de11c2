"""MXFP4 experts (gpt-oss): 32 FP4 numbers share a scale that is a power of two.

Source of the format: OCP Microscaling Formats specification 1.0, and how gpt-oss lays it out: ``_blocks``
``[experts, rows, groups, 16]`` bytes and ``_scales`` ``[experts, rows, groups]``; the model's weight is transposed,
``[experts, columns, rows]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .format import Format, Parts
from .packing import power_of_two, unpack_fp4


def formats(config: Mapping[str, Any]) -> list[Format]:
    return [Format("_blocks", ("_scales",), (), "", _unpack, rows={"_blocks": 1, "_scales": 1}, stacked=True)]


def _unpack(parts: Parts) -> torch.Tensor:
    blocks, scales = parts["_blocks"], parts["_scales"]
    if blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks {list(blocks.shape)} don't fit scales {list(scales.shape)}")
    experts, rows, groups, half = blocks.shape
    # bfloat16 holds all of these exactly; one expert at a time, as FP4 makes eight times as much in float32.
    weight = torch.empty(experts, 2 * half * groups, rows, dtype=torch.bfloat16)
    for index in range(experts):
        numbers = unpack_fp4(blocks[index]).mul_(power_of_two(scales[index])[..., None])
        weight[index] = numbers.flatten(1).T
    return weight
