"""A model's own transformers class without memory behind it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat.building import build_model, fill_buffers
from ..errors import ModelError
from .families import Family
from .model_source import ModelSource
from .probe import unserved


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the whole model, with a config of its own.
        base: the module in it that holds the list of blocks.
        layers: that list.
        layers_name: its name in ``model``, such as ``model.layers``.
    """

    model: PreTrainedModel
    base: nn.Module
    layers: nn.ModuleList
    layers_name: str

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def empty_layers(self) -> None:
        """Leave the model without its blocks."""
        setattr(self.base, self.layers_name.rpartition(".")[2], nn.ModuleList())


def build_skeleton(source: ModelSource, dtype: torch.dtype, *, attention: str | None = None) -> Skeleton:
    """The model's own class, no memory behind its parameters and buffers.

    Raises:
        ModelError: its config can't be built, or no list of decoder blocks is found in it.
    """
    config = copy.deepcopy(source.config)
    try:
        model = build_model(config, dtype, attention)
    except Exception as error:  # a class's own complaints about its config
        raise ModelError(f"can't build model {source.name!r} from its config: {error}") from error
    name = _layers_name(model, source.num_blocks)
    parent = model.get_submodule(name.rpartition(".")[0])
    layers = model.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    return Skeleton(model.eval(), parent, layers, name)


def _layers_name(model: PreTrainedModel, count: int) -> str:
    # The outermost: a list of experts in a block may happen to be of the same length.
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not names:
        raise unserved(model.config.model_type, f"{type(model).__name__} has no list of {count} blocks")
    return min(names, key=lambda name: name.count("."))


def fill_buffers_of(model: PreTrainedModel, root: nn.Module, device: torch.device, family: Family) -> None:
    try:
        fill_buffers(model, root, device, lambda module, name: family.buffer(module, name, model.config))
    except ValueError as error:
        raise ModelError(str(error)) from error
