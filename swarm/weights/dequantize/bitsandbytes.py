"""What bitsandbytes stores: 4 bits (NF4 or FP4, absmax a block, which may be quantized too) and 8 bits (absmax a row).

Source of the format: QLoRA (Dettmers et al. 2023) and LLM.int8() (2022); names as ``QuantState.as_dict(packed=True)``
of bitsandbytes writes them. The package itself isn't needed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from .format import Format, Headers, Parts
from .numbers import Codes, Integers, Layout

Kind = Literal["nf4", "fp4"]

_STATE = ".weight.quant_state.bitsandbytes__"


def formats(config: Mapping[str, Any]) -> list[Format]:
    nested = (".weight.nested_absmax", ".weight.nested_quant_map")
    four = [
        Format(
            ".weight",
            (".weight.absmax", ".weight.quant_map", _STATE + kind),
            nested,
            ".weight",
            _unpack_4bit,
            functools.partial(_layout_4bit, kind),
            functools.partial(_read_4bit, kind),
        )
        for kind in ("nf4", "fp4")
    ]
    rows = {".weight": 0, ".SCB": 0}
    eight = Format(
        ".weight", (".SCB",), (), ".weight", lambda parts: _read_8bit(parts).weight(), _layout_8bit, _read_8bit, rows
    )
    return [*four, eight]


def _layout_4bit(kind: Kind, headers: Headers, out: int, inputs: int) -> Layout:
    return Layout(kind, out * inputs // headers[".weight.absmax"].numel)


def _read_4bit(kind: Kind, parts: Parts) -> Codes:
    state, absmax = _state(parts)
    out, inputs = state["shape"]
    numbers = parts[".weight"].view(torch.uint8).view(out, inputs // 2)
    return Codes(numbers, absmax.view(out, inputs // state["blocksize"]), parts[".weight.quant_map"].float(), kind)


def _state(parts: Parts) -> tuple[dict[str, Any], torch.Tensor]:
    """What is said of the weight, and the scale float32 of each block."""
    packed_state = next(tensor for name, tensor in parts.items() if name.startswith(_STATE))
    state = json.loads(bytes(packed_state.tolist()))
    absmax = parts[".weight.absmax"]
    if ".weight.nested_absmax" in parts:
        absmax = _blocks(
            parts[".weight.nested_quant_map"][absmax.int()], parts[".weight.nested_absmax"], state["nested_blocksize"]
        )
        absmax = absmax + state["nested_offset"]
    return state, absmax.float()


def _unpack_4bit(parts: Parts) -> torch.Tensor:
    state, absmax = _state(parts)
    packed = parts[".weight"].reshape(-1)
    numbers = torch.stack([packed >> 4, packed & 15], -1).flatten()[: math.prod(state["shape"])]
    return _blocks(parts[".weight.quant_map"][numbers.int()], absmax, state["blocksize"]).view(state["shape"])


def _blocks(numbers: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """``numbers`` times the scale of their block, which are ``size`` long, the last one perhaps less."""
    if len(scale) != -(-len(numbers) // size):
        raise ValueError(f"{len(scale)} scales don't fit {len(numbers)} numbers in blocks of {size}")
    whole = len(numbers) // size * size
    numbers[:whole].view(-1, size).mul_(scale[: whole // size, None])
    if whole < len(numbers):
        numbers[whole:].mul_(scale[-1])
    return numbers


def _read_8bit(parts: Parts) -> Integers:
    weight = parts[".weight"]
    if weight.dtype is not torch.int8:
        raise ValueError(f"its weight is {weight.dtype}, not int8")
    return Integers(weight, None, parts[".SCB"].float()[:, None] / 127)


def _layout_8bit(headers: Headers, out: int, inputs: int) -> Layout:
    return Layout("int8", inputs)
