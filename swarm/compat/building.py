"""Models on the meta device: building them, computing their buffers, and which of their weights are tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LAYER_LISTS = ("layers", "h", "blocks")
"""What transformers' models call their list of blocks."""


def build_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A causal language model of this config without memory behind its parameters and buffers. Draws no random numbers.

    ``attention``: the name of a function that transformers knows; None for its own choice.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model


def fill_buffers(
    model: PreTrainedModel,
    root: nn.Module,
    device: torch.device,
    compute: Callable[[nn.Module, str], torch.Tensor | None],
) -> None:
    """Memory and values for the buffers in ``root`` that no checkpoint holds, such as rotary frequencies.

    transformers computes them when a module is initialized. Parameters are on the meta device still, so that
    initializing them too costs nothing. What is computed in another way is asked of ``compute(module, name)``.

    Raises:
        ValueError: neither computes a buffer.
    """
    for module in root.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        for name in names:
            buffer = torch.empty_like(module._buffers[name], device=device)  # type: ignore[arg-type]
            module._buffers[name] = buffer.fill_(_never(buffer.dtype))
        # a model in a model has rules of its own, which look at itself
        with torch.no_grad():
            (module if isinstance(module, PreTrainedModel) else model)._init_weights(module)
        for name in names:
            filled = module._buffers[name]
            assert filled is not None
            if filled.dtype is torch.bool or not bool((filled == _never(filled.dtype)).any()):
                continue
            value = compute(module, name)
            if value is None:
                raise ValueError(f"{type(module).__name__}.{name} can't be computed by this version of transformers")
            filled.copy_(value)


def _never(dtype: torch.dtype) -> float:
    """A value that no buffer has."""
    if dtype is torch.bool:
        return 0
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).min


def buffers_only(base: nn.Module) -> list[nn.Module]:
    """The modules beside a list of blocks that have no parameters, such as rotary embeddings."""
    return [
        module
        for module in base.children()
        if not isinstance(module, nn.ModuleList) and not any(True for _ in module.parameters())
    ]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that are the same as another's, and that other's."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def tie(model: PreTrainedModel, missing: set[str]) -> None:
    """Makes tied weights the same once those that a checkpoint has are loaded; ``missing`` are those it hasn't."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
