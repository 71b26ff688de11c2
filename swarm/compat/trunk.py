"""The code around a model's list of blocks, which a client runs: how it calls its layers, what it makes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import choose_attention
from .building import LAYER_LISTS
from .caches import HollowCache
from .keywords import cache_keyword, with_cache

_NO_ATTENTION = "swarm_client"
"""transformers builds no masks for an attention that it doesn't know."""
INNER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options that ask for what is inside a model."""


class OneLayer(nn.ModuleList):
    """A list of one layer. Slicing makes no new list: most families slice theirs for every token."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


class _NoPositions(nn.Module):
    """In place of rotary embeddings, which only blocks use."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        return None, None


def find_trunk(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module that has the empty list of layers, and the list's name in it."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in LAYER_LISTS and isinstance(module, nn.ModuleList) and len(module) == 0:
            return model.get_submodule(path.rpartition(".")[0]), name
    return None


def strip_trunk(model: PreTrainedModel, trunk: nn.Module) -> None:
    """Takes from a trunk what only blocks use (positions, biases, masks), and from its config what asks for their
    insides."""
    for child, module in list(trunk.named_children()):
        if "rotary" in child or "rotary" in type(module).__name__.lower():
            setattr(trunk, child, _NoPositions())
    # ALiBi families make the bias for all layers in their trunk
    if hasattr(trunk, "use_alibi"):  # Falcon
        trunk.__dict__["use_alibi"] = False
    if hasattr(trunk, "build_alibi_tensor"):  # BLOOM; without a mask it goes by the cache's get_mask_sizes
        trunk.__dict__["build_alibi_tensor"] = _no_biases
    choose_attention(model.config, _NO_ATTENTION)
    for flag in INNER_OUTPUTS:
        if getattr(model.config, flag, None):
            setattr(model.config, flag, False)


def _no_biases(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def takes_tuple(trunk: nn.Module, gives_tuple: Callable[[bool], None], echo: HollowCache) -> bool | None:
    """Whether the family's loop takes ``outputs[0]`` of what a layer returns, or the whole. None: neither works.

    Tried with two rows, of which a loop of the wrong kind would leave one.

    Args:
        gives_tuple: makes the trunk's one layer give a tuple, or not.
        echo: a cache with which that layer gives back what it is given.
    """
    ids = torch.zeros(2, 1, dtype=torch.int64, device=next(trunk.parameters()).device)
    options = with_cache({"use_cache": False}, echo, cache_keyword(type(trunk)))
    for answer in (False, True):
        gives_tuple(answer)
        try:
            with torch.no_grad():
                hidden = trunk(ids, **options)[0]
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, StopIteration):
            continue
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (2, 1):
            return answer
    return None
