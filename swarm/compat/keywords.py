"""The keyword under which transformers hands a cache down to models, blocks, attention and mixers.

It was ``past_key_values`` (``layer_past`` in some blocks, ``cache_params`` in mixers) and is ``cache`` since 5.24.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

__all__ = [
    "CACHE_NAMES",
    "GENERATE_KEYWORD",
    "OLDEST_KEYWORD",
    "ModelOutput",
    "cache_keyword",
    "cache_of",
    "given_cache",
    "take_cache",
    "with_cache",
]

OLDEST_KEYWORD = "past_key_values"
CACHE_NAMES = ("cache", OLDEST_KEYWORD, "layer_past", "cache_params")
"""All that is known, the newest first."""


def _name_in(parameters: Mapping[str, Any]) -> str | None:
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_keyword(kind: type[nn.Module]) -> str | None:
    """The name that modules of this class take a cache under; None: they take none."""
    return _name_in(_parameters(kind.forward))


@functools.cache
def _parameters(function: Any) -> Mapping[str, Any]:
    return inspect.signature(function).parameters


GENERATE_KEYWORD = _name_in(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters) or "cache"
"""The name that ``generate()`` takes a cache under and hands it on."""


def given_cache(keywords: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, whatever it is called there; None: there is none."""
    return next((keywords[name] for name in CACHE_NAMES if keywords.get(name) is not None), None)


def with_cache(keywords: Mapping[str, Any], cache: Any, name: str | None) -> dict[str, Any]:
    """``keywords`` with ``cache`` as their only cache, under ``name``; None for either: without one."""
    rest = {key: value for key, value in keywords.items() if key not in CACHE_NAMES}
    return rest if cache is None or name is None else {**rest, name: cache}


def cache_of(output: ModelOutput) -> Any:
    """The cache that a model's output carries, or None."""
    name = _name_in(dict(output.items()))
    return None if name is None else output[name]


def take_cache(output: ModelOutput) -> None:
    """Sets the cache that a model's output carries to None."""
    name = _name_in(dict(output.items()))
    if name is not None:
        output[name] = None
