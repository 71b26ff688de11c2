"""GPTQ: 2, 3, 4 or 8 bits, a scale and a zero a group of inputs, inputs perhaps in another order (``g_idx``).

Source of the format: AutoGPTQ's and GPTQModel's linear layers. ``qweight`` ``[in * bits / 32, out]`` is packed along
the inputs, ``qzeros`` ``[groups, out * bits / 32]`` along the outputs. In the first format zeros are stored less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .format import Format, Headers, Parts
from .numbers import Integers, Layout
from .packing import unpack_words


def formats(config: Mapping[str, Any]) -> list[Format]:
    bits = int(config["bits"])
    form = str(config.get("checkpoint_format") or "gptq")
    if bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise ValueError(f"{bits} bits in format {form!r}")

    def read(parts: Parts) -> Integers:
        numbers = unpack_words(parts[".qweight"].T.contiguous(), bits)  # [out, in]
        zeros = unpack_words(parts[".qzeros"], bits).int() + (1 if form == "gptq" else 0)  # [groups, out]
        scales, inputs = parts[".scales"], numbers.shape[1]
        if zeros.shape != scales.shape:
            raise ValueError(f"zeros {list(zeros.shape)} don't fit scales {list(scales.shape)}")
        group = parts.get(".g_idx")
        columns = torch.arange(inputs) // -(-inputs // len(scales)) if group is None else group.long()
        return Integers(numbers, zeros.T, scales.T, columns)

    def layout(headers: Headers, out: int, inputs: int) -> Layout | None:
        group = inputs * out // headers[".scales"].numel
        if bits == 4:
            return Layout("int4", group, ordered=".g_idx" in headers)
        return Layout("int8", group) if bits == 8 and config.get("sym") and group == inputs else None

    return [
        Format(
            ".qweight", (".qzeros", ".scales"), (".g_idx",), ".weight", lambda parts: read(parts).weight(), layout, read
        )
    ]
