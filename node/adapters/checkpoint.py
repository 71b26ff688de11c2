"""Reading LoRA adapters that PEFT has saved: which of a model's layers they change, and the matrices for a span."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from swarm.errors import ModelError
from swarm.model.skeleton import Skeleton
from swarm.weights.checkpoint import DTYPES
from swarm.weights.filling import make_module_finder
from swarm.weights.hub.one_file import HubRepo
from swarm.weights.safetensors_header import TensorRange, read_ranges

from ..engine.blocks.packing import is_plain_linear
from .config import AdapterConfig, AdapterSpec, read_config

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FLOAT32 = 4


@dataclass(frozen=True)
class LayerTensors:
    """One linear layer's part of an adapter: the names of its tensors in the file, and how it is scaled."""

    down: str
    up: str
    scale: float
    numbers: int


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter whose tensors fit the model.

    Attributes:
        name: in the swarm.
        file: where the tensors are.
        digest: a hash of all that it computes with, the same wherever the same adapter is.
        blocks: for each block of the model, the layers that it changes, by their name in the block.
    """

    name: str
    file: Path
    digest: str
    blocks: tuple[Mapping[str, LayerTensors], ...]

    @property
    def block_bytes(self) -> int:
        """Memory that it takes in the block where it takes most."""
        return _FLOAT32 * max(sum(layer.numbers for layer in layers.values()) for layers in self.blocks)

    def load(self, block: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For each layer of ``block`` that it changes the matrices ``[rank, in]`` and ``[out, rank]``, float32 as PEFT
        computes them in; the second is scaled. Nothing else is read.

        Raises:
            ModelError: the file can't be read.
        """
        try:
            with safe_open(self.file, framework="pt") as tensors:
                return {
                    name: (
                        tensors.get_tensor(layer.down).to(torch.float32, copy=True),
                        tensors.get_tensor(layer.up).to(torch.float32, copy=True).mul_(layer.scale),
                    )
                    for name, layer in self.blocks[block].items()
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"can't read {self.file}: {error}") from error


def open_adapter(
    spec: AdapterSpec,
    skeleton: Skeleton,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> AdapterCheckpoint:
    """Finds an adapter, and checks that it can be served on the model of ``skeleton`` before anything is loaded.

    Raises:
        ModelError: it isn't found, isn't plain LoRA on linear layers in the blocks, or doesn't fit the model.
    """
    fetch = _finder(spec, token, cache_dir)
    config_file, file = fetch(CONFIG), fetch(WEIGHTS)
    if config_file is None:
        raise ModelError(f"no {CONFIG} in {spec.where!r}: give an adapter that PEFT has saved")
    try:
        config = read_config(json.loads(config_file.read_text(encoding="utf-8")), repr(spec.name))
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {config_file}: {error}") from error
    if file is None:
        raise ModelError(_no_weights(spec, pickled=fetch(PICKLED) is not None))
    try:
        with file.open("rb") as stream:
            header = read_ranges(stream, os.fstat(stream.fileno()).st_size)
            digest = _digest(config, stream)
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {file}: {error}; if it was cut short, copy or download it again") from error
    return AdapterCheckpoint(spec.name, file, digest, match_layers(repr(spec.name), config, header, skeleton))


def _finder(spec: AdapterSpec, token: str | bool | None, cache_dir: str | Path | None) -> Callable[[str], Path | None]:
    directory = Path(spec.where).expanduser()
    if directory.is_dir():
        return lambda name: directory / name if (directory / name).is_file() else None
    if spec.where.startswith(("/", "./", "../", "~")):
        raise ModelError(f"there is no directory {spec.where!r} with an adapter")
    return HubRepo(spec.where, spec.revision, token, cache_dir).fetch


def _digest(config: AdapterConfig, weights: BinaryIO) -> str:
    weights.seek(0)
    found = hashlib.sha256(repr(replace(config, targets=())).encode())
    while part := weights.read(1 << 20):
        found.update(part)
    return found.hexdigest()[:16]


def _no_weights(spec: AdapterSpec, *, pickled: bool) -> str:
    if not pickled:
        return f"no {WEIGHTS} in {spec.where!r}"
    return (
        f"{spec.where!r} has its weights as {PICKLED} only, which is never opened (it can run code): convert it with "
        "PeftModel.from_pretrained(base, …).save_pretrained(NEW_DIRECTORY) and use that"
    )


def match_layers(
    where: str, config: AdapterConfig, header: Mapping[str, TensorRange], skeleton: Skeleton
) -> tuple[Mapping[str, LayerTensors], ...]:
    """For each block of the model the layers that an adapter changes, from the header of its file.

    Raises:
        ModelError: some tensor is none of LoRA's, is missing, has a shape that doesn't fit, or belongs to something
            that is not a linear layer of a block.
    """
    sides: dict[str, dict[str, str]] = {}
    for key in header:
        found = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
        if found is None:
            raise ModelError(f"adapter {where} has {key}, which can't be served: only LoRA on linear layers can")
        sides.setdefault(found["module"], {})[found["side"]] = key
    blocks: tuple[dict[str, LayerTensors], ...] = tuple({} for _ in skeleton.layers)
    find, begin = make_module_finder(skeleton.model), f"{skeleton.layers_name}."
    for module, keys in sides.items():
        own, merged = find(module)
        if own is None:
            raise ModelError(f"adapter {where} changes {module}, which this model hasn't: is it made for another one?")
        if merged:
            raise ModelError(f"adapter {where} changes {module}, which is a part of {own} here: that can't be served")
        if not own.startswith(begin):
            raise ModelError(
                f"adapter {where} changes {module}, which clients compute and not nodes: only LoRA on the linear "
                "layers of blocks can be served"
            )
        block, _, name = own.removeprefix(begin).partition(".")
        layer = skeleton.layers[int(block)].get_submodule(name)
        if not is_plain_linear(layer):
            raise ModelError(
                f"adapter {where} changes {module}, which is of type {type(layer).__name__} here and no linear layer: "
                "that can't be served"
            )
        blocks[int(block)][name] = _checked(where, module, keys, config, header, layer)
    _require_all(where, config, blocks, skeleton)
    return blocks


def _checked(
    where: str,
    module: str,
    keys: Mapping[str, str],
    config: AdapterConfig,
    header: Mapping[str, TensorRange],
    layer: nn.Linear,
) -> LayerTensors:
    rank = config.rank_of(module)
    for side, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
        if side not in keys:
            raise ModelError(f"adapter {where} has no lora_{side} for {module}: its file is not whole")
        found = header[keys[side]]
        if found.shape != shape:
            raise ModelError(
                f"{keys[side]} of adapter {where} has shape {list(found.shape)}, but this model and rank {rank} ask "
                f"for {list(shape)}: is it made for another model?"
            )
        if found.dtype not in DTYPES or not DTYPES[found.dtype].is_floating_point:
            raise ModelError(f"{keys[side]} of adapter {where} is of type {found.dtype}, which can't be served")
    numbers = rank * (layer.in_features + layer.out_features)
    return LayerTensors(keys["A"], keys["B"], config.scale_of(module), numbers)


def _require_all(
    where: str, config: AdapterConfig, blocks: Sequence[Mapping[str, LayerTensors]], skeleton: Skeleton
) -> None:
    for index, block in enumerate(skeleton.layers):
        for name, module in block.named_modules():
            whole = f"{skeleton.layers_name}.{index}.{name}"
            if is_plain_linear(module) and config.wants(whole) and name not in blocks[index]:
                raise ModelError(f"adapter {where} has no tensors for {whole}, which is in its target_modules")
    if not any(blocks):
        raise ModelError(f"adapter {where} changes nothing: its file has no tensors")
