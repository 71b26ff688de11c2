"""FP8 weights with a scale a block (DeepSeek, Qwen): ``quant_method: fp8``.

Source of the format: DeepSeek-V3's ``weight_dequant`` (https://github.com/deepseek-ai/DeepSeek-V3): despite its name,
``weight_scale_inv`` is what to multiply with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .format import Format, Parts
from .packing import by_blocks, fp8_to_float, power_of_two


def formats(config: Mapping[str, Any]) -> list[Format]:
    block = tuple(config.get("weight_block_size") or ()) or None

    def unpack(parts: Parts) -> torch.Tensor:
        weight, scale = parts[""], parts["_scale_inv"]
        if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(f"its weight is {weight.dtype}, not FP8")
        scale = scale.float() if scale.dtype.itemsize > 1 else power_of_two(scale)
        return by_blocks(torch.Tensor.mul_, fp8_to_float(weight), scale, block=block)

    return [
        Format(
            "", ("_scale_inv",), (), "", unpack, rows={"": 0, "_scale_inv": 0}, row_block=block[0] if block else None
        )
    ]
