"""Renaming and converting a checkpoint's weights by transformers' own rules, and giving them to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

natural_key = dot_natural_key
"""The order in which transformers reads a checkpoint's names: numbers by their value."""


class Rules:
    """transformers' rules for a model's weights, for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self._own = model.base_model_prefix, model.state_dict()

    def rename(self, key: str) -> tuple[str | None, str | None]:
        """From a checkpoint's name to the model's, and the pattern of the conversion that makes the one of the other.
        None: the model has no use for it; no conversion."""
        given = in_text_model(key, self._own)
        name, pattern = rename_source_key(given, self._renamings, self._converters, self._prefix, self._own)
        if name not in self._own and given in self._own:
            name, pattern = given, None
        return (name, pattern) if name in self._own else (None, None)

    def stacked_kinds(self, pattern: str) -> tuple[str, ...] | None:
        """The patterns of all kinds of parts (gate, up), if the conversion of ``pattern`` does no more than stack the
        parts of each kind and put the kinds next to each other; else None."""
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        operations, kinds = rule.operations, tuple(rule.source_patterns)
        if len(rule.target_patterns) != 1 or not operations:
            return None
        stacks = type(operations[0]) is MergeModulelist and operations[0].dim == 0
        if len(operations) == 1:
            return kinds if stacks and len(kinds) == 1 else None
        joins = len(operations) == 2 and type(operations[1]) is Concatenate and operations[1].dim == 1
        return kinds if stacks and joins else None


def in_text_model(key: str, own: Mapping[str, Any]) -> str:
    """The name that a tensor of a model with images or sound has in its text part alone, whose names are ``own``."""
    return key if key in own else key.replace("language_model.", "", 1)


@dataclass(frozen=True)
class Loaded:
    """What came of loading.

    Attributes:
        missing: names of the model's tensors that were not among those given.
        mismatched: name, shape found and shape expected, of each tensor of another shape.
        failed: names that could not be converted.
    """

    missing: frozenset[str]
    mismatched: tuple[tuple[str, Any, Any], ...]
    failed: tuple[str, ...]


def convert_into(
    model: PreTrainedModel, tensors: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, convert: bool
) -> Loaded:
    """Loads ``tensors`` (or what gives one when indexed with ``[...]``), by a checkpoint's names, into a model whose
    parameters are on the meta device. Without ``convert`` they have the model's names already."""
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(
            model,
            dict(tensors),
            LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                device_map={"": device},
                weight_mapping=get_model_conversion_mapping(model) if convert else [],  # type: ignore[arg-type]
            ),
        )
    return Loaded(
        frozenset(info.missing_keys), tuple(sorted(info.mismatched_keys)), tuple(sorted(info.conversion_errors))
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bar, which would start anew for each block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
