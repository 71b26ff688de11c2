"""Quantized checkpoints: weights are computed from what is stored, one tensor at a time, when they are read.

What comes out are ordinary weights under the model's ordinary names, so that nothing else needs to know: renames,
stacking of experts and a quantization of the node's own are applied to them as to any others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ModelError
from . import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from .format import Format, Header, Headers, PackedTensor, Parts, find_packed
from .numbers import Codes, Integers, Layout

__all__ = [
    "Codes",
    "Format",
    "Header",
    "Headers",
    "Integers",
    "Layout",
    "PackedTensor",
    "Parts",
    "Quantization",
    "find_packed",
    "quantization_of",
]

_METHODS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[Format]]]] = {
    "awq": ("AWQ", awq.formats),
    "bitsandbytes": ("bitsandbytes", bitsandbytes.formats),
    "compressed-tensors": ("compressed-tensors", compressed_tensors.formats),
    "fp8": ("FP8", fp8.formats),
    "gptq": ("GPTQ", gptq.formats),
    "mxfp4": ("MXFP4", mxfp4.formats),
}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized. ``title`` is for people."""

    title: str
    formats: tuple[Format, ...]


def quantization_of(model: str, config: Mapping[str, Any] | None) -> Quantization | None:
    """What a config's ``quantization_config`` says; None if there is none.

    Raises:
        ModelError: weights of this kind can't be computed here.
    """
    if not config:
        return None
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else "of an unnamed kind"))
    if method not in _METHODS:
        raise ModelError(
            f"model {model!r} is quantized with {method}, which can't be read here (what can: "
            f"{', '.join(sorted(_METHODS))}): use the original weights"
        )
    title, formats = _METHODS[method]
    try:
        return Quantization(title, tuple(formats(config)))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {model!r} is quantized with {title}: {error} can't be read here") from error
