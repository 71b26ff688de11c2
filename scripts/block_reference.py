"""What transformers makes of one block of a checkpoint: its own layer, rotary embeddings, masks and cache."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import block_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from swarm.node.hosting.placement.hardware import free_memory

ROWS, PROMPT, STEPS = 2, 24, 4
"""Sequences; tokens of each that are prefilled; and those that are decoded one by one."""


@dataclass(frozen=True)
class Reference:
    """``inputs`` of the block and its ``outputs``, ``[ROWS, PROMPT + STEPS, H]`` bfloat16.

    Attributes:
        exact: the outputs for the same inputs in float32; None if there is too little memory.
        block_bytes: of the block's weights.
        cache_bytes: that transformers' cache takes for one token.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    exact: torch.Tensor | None
    block_bytes: int
    cache_bytes: int

    def save(self, file: Path) -> None:
        """For another process."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        numbers = {name: json.dumps(value) for name, value in fields.items() if isinstance(value, int)}
        save_file({name: value for name, value in fields.items() if name not in numbers}, file, metadata=numbers)

    @classmethod
    def load(cls, file: Path) -> Reference:
        """What :meth:`save` wrote."""
        with safe_open(file, framework="pt") as opened:
            numbers = {name: json.loads(value) for name, value in opened.metadata().items()}
        return cls(**{"exact": None, **load_file(file), **numbers})


def compute(directory: Path, block: int) -> Reference:
    """Runs the block as the only one of a model with few tokens and random embeddings."""
    model = load_block(directory, block)
    layer = next(each for each in model.get_decoder().modules() if isinstance(each, torch.nn.ModuleList))[0]
    block_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    inputs, outputs, cache_bytes = _run(model, layer)
    exact = None
    if free_memory(torch.device("cpu")) > 2.2 * block_bytes:
        for module in model.modules():  # one after the other, or all would be there twice
            module._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, recurse=False)
        _, exact, _ = _run(model, layer, inputs.float())
    return Reference(inputs, outputs, exact, block_bytes, cache_bytes)


def load_block(directory: Path, block: int) -> PreTrainedModel:
    """A model of this one block, loaded by transformers."""
    config = _alone(AutoConfig.from_pretrained(directory), block)
    weights: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118
            if block_of(name) == block:
                weights[name.replace(f".{block}.", ".0.", 1)] = opened.get_slice(name)
    torch.manual_seed(0)
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # or it tells that embeddings and head are missing
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16, output_loading_info=True
    )
    if missing := [name for name in info["missing_keys"] if block_of(name) is not None]:
        raise SystemExit(f"{directory} lacks {', '.join(sorted(missing))}")
    return model.eval()


def _alone(config: PreTrainedConfig, block: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    if (dense := getattr(config, "first_k_dense_replace", None)) is not None:
        config.first_k_dense_replace = int(block < dense)
    config.num_hidden_layers, config.vocab_size = 1, 256
    return config


@torch.no_grad()
def _run(
    model: PreTrainedModel, layer: torch.nn.Module, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The layer's inputs and outputs, and its cache's bytes a token; with the inputs ``given``, if any."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def before(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else named.pop("hidden_states")
        if given is not None:
            done = sum(each.shape[1] for each in inputs)
            hidden = given[:, done : done + hidden.shape[1]]
        inputs.append(hidden)
        return (hidden, *args[1:]), named

    def after(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    ids = torch.randint(16, 256, (ROWS, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    for part in ids.split([PROMPT] + [1] * STEPS, dim=1):
        model(part, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    kept = sum(tensor.nbytes for tensor in (cache.layers[0].keys, cache.layers[0].values))
    return torch.cat(inputs, 1), torch.cat(outputs, 1), kept // ids.numel()


if __name__ == "__main__":
    compute(Path(sys.argv[1]), int(sys.argv[2])).save(Path(sys.argv[3]))
