"""GPTQ: 2, 3, 4 or 8 bits, a scale and a zero a group of inputs, inputs perhaps in another order (``g_idx``).

Source of the format: AutoGPTQ's and GPTQModel's linear layers. ``qweight`` ``[in * bits / 32, out]`` is packed along
the inputs, ``qzeros`` ``[groups, out * bits / 32]`` along the outputs. In the first format zeros are stored less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swarm.dequantize.format import Format, Parts
from swarm.dequantize.packing import by_blocks, unpack_words


def formats(config: Mapping[str, Any]) -> list[Format]:
    bits = int(config["bits"])
    form = str(config.get("checkpoint_format") or "gptq")
    if bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise ValueError(f"{bits} bits in format {form!r}")

    def unpack(parts: Parts) -> torch.Tensor:
        numbers = unpack_words(parts[".qweight"].T.contiguous(), bits)  # [out, in]
        zeros = unpack_words(parts[".qzeros"], bits) + (1 if form == "gptq" else 0)  # [groups, out]
        scales, inputs = parts[".scales"].float(), numbers.shape[1]
        if zeros.shape != scales.shape:
            raise ValueError(f"zeros {list(zeros.shape)} don't fit scales {list(scales.shape)}")
        group = parts.get(".g_idx")
        columns = torch.arange(inputs) // -(-inputs // len(scales)) if group is None else group.long()
        weight = by_blocks(torch.Tensor.sub_, numbers.float(), zeros.T.float(), columns=columns)
        return by_blocks(torch.Tensor.mul_, weight, scales.T, columns=columns)

    return [Format(".qweight", (".qzeros", ".scales"), (".g_idx",), ".weight", unpack)]
