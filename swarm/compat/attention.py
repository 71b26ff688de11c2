"""Attention by name: how blocks are told which function computes their attention, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

UNDERSTOOD = frozenset({"scaling", "alibi", "sliding_window", "softcap", "s_aux", "attention_chunk"})
"""The keywords of an attention function's call that our functions promise to understand."""
HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "position_embeddings", "cache_position"}
)
"""Those that say nothing about the result here."""


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """From now on blocks whose config names ``name`` call ``function(module, query, key, value, mask, **options)``."""
    AttentionInterface.register(name, function)


def choose_attention(config: PreTrainedConfig, name: str) -> None:
    """Sets the function that all blocks of this config use. By hand, not as an option of building the model, which
    insists that the function be registered already. For a name that transformers doesn't know it builds no masks."""
    config._attn_implementation = name


def attention_of(config: Any) -> Callable[..., Any]:
    """The function that blocks of this config use."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    return function
