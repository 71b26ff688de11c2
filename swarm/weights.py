"""Filling parts of a meta-device model from a checkpoint, with transformers' own renames and conversions.

A checkpoint's names are not always the model's: old names, names without the base model's prefix, experts that are
stored one by one and live fused. transformers has rules for all that, which are applied here to exactly the tensors
that are wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from swarm.checkpoint import Checkpoint
from swarm.errors import ModelError
from swarm.memory import trim
from swarm.stacking import LazyStack, can_stack


@dataclass(frozen=True)
class WeightPlan:
    """Which of a checkpoint's tensors make which of the model's.

    Attributes:
        sources: by the model's name of a tensor, the checkpoint's names of what it is made of. Where one of the
            checkpoint's makes several of the model's, it stands under the first.
        stacks: for those of them that are stacked experts, the names by kind of part.
        converted: those that are changed in more than their names.
    """

    sources: Mapping[str, tuple[str, ...]]
    stacks: Mapping[str, tuple[tuple[str, ...], ...]]
    converted: frozenset[str]

    def only(self, wanted: Callable[[str], bool]) -> WeightPlan:
        """The part for the model's tensors whose names are ``wanted``."""
        return WeightPlan(
            {name: keys for name, keys in self.sources.items() if wanted(name)},
            {name: columns for name, columns in self.stacks.items() if wanted(name)},
            self.converted,
        )

    def keys(self) -> list[str]:
        """The checkpoint's names of all that is needed."""
        return [key for keys in self.sources.values() for key in keys]


def plan_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> WeightPlan:
    """The plan for a whole model. Tensors that the model has no use for (old rotary buffers) are left out."""
    rules = get_model_conversion_mapping(model)
    by_pattern = {
        pattern: rule for rule in rules if isinstance(rule, WeightConverter) for pattern in rule.source_patterns
    }
    rename = _renamer(model)
    sources: defaultdict[str, list[str]] = defaultdict(list)
    columns: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    converted: set[str] = set()
    for key in sorted(checkpoint.files, key=dot_natural_key):
        name, pattern = rename(key)
        if name is None:
            continue
        sources[name].append(key)
        if pattern is not None:
            converted.add(name)
        if pattern is not None and can_stack(by_pattern[pattern]):
            columns[name][pattern].append(key)
    stacks = {}
    for name, found in columns.items():
        kinds = by_pattern[next(iter(found))].source_patterns
        stacks[name] = tuple(tuple(found[kind]) for kind in kinds)
    return WeightPlan({name: tuple(keys) for name, keys in sources.items()}, stacks, frozenset(converted))


def _renamer(model: PreTrainedModel) -> Callable[[str], tuple[str | None, str | None]]:
    """From a checkpoint's name to the model's, and the pattern of the conversion that makes the one of the other."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = model.state_dict()

    def rename(key: str) -> tuple[str | None, str | None]:
        given = _in_text_model(key, own)
        name, pattern = rename_source_key(given, renamings, converters, model.base_model_prefix, own)
        if name not in own and given in own:
            name, pattern = given, None
        return (name, pattern) if name in own else (None, None)

    return rename


def make_module_finder(model: PreTrainedModel) -> Callable[[str], tuple[str | None, bool]]:
    """From the name that a module with weights has in some version of transformers to its name in ``model``, and
    whether it is only a part of that there (an expert of those stacked in one tensor); None if there is none."""
    rename, own = _renamer(model), model.state_dict()

    def find(module: str) -> tuple[str | None, bool]:
        key = f"{module}.weight"
        name, pattern = (key, None) if key in own else rename(key)
        return None if name is None else name.removesuffix(".weight"), pattern is not None

    return find


def load_weights(
    model: PreTrainedModel,
    plan: WeightPlan,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    mapped: bool = False,
) -> set[str]:
    """Load what ``plan`` names into ``model``, whose parameters are on the meta device.

    Returns the names of the model's tensors that were not loaded.

    Raises:
        ModelError: a tensor has the wrong shape, can't be read, or can't be converted.
    """
    own = model.state_dict()
    missing = set(own)
    for group in _groups(plan):
        tensors: dict[str, Any] = {}
        for name, keys in group.sources.items():
            if name in group.stacks:
                # Under the model's own name, where no conversion applies any more.
                tensors[name] = LazyStack(checkpoint, name, own[name].shape, group.stacks[name], dtype)
            else:
                tensors |= {_in_text_model(key, own): checkpoint.lazy(key, mapped=mapped) for key in keys}
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(
                model,
                tensors,
                LoadStateDictConfig(
                    dtype=dtype,
                    dtype_plan=model._get_dtype_plan(dtype),
                    device_map={"": device},
                    weight_mapping=[] if group.stacks else get_model_conversion_mapping(model),  # type: ignore[arg-type]
                ),
            )
        for name, found, expected in sorted(info.mismatched_keys):
            raise ModelError(
                f"tensor {name} has shape {list(found)} in {_file(checkpoint, group, name)}, but the model's config "
                f"asks for {list(expected)}: config.json and weights don't belong together"
            )
        for name in sorted(info.conversion_errors):
            raise ModelError(
                f"tensor {name} can't be made from what is in {_file(checkpoint, group, name)}: "
                "parts of it are missing or have the wrong shape"
            )
        missing &= info.missing_keys
        trim()
    return missing


def _in_text_model(key: str, own: Mapping[str, Any]) -> str:
    """The name that a tensor of a model with images or sound has in its text part alone."""
    return key if key in own else key.replace("language_model.", "", 1)


def _groups(plan: WeightPlan) -> Iterator[WeightPlan]:
    """What is loaded in one go. Tensors that are made of many each go alone: while one is put together its parts may
    be in memory too, and all of a block's at once would be the block a second time."""
    many = {name for name, keys in plan.sources.items() if len(keys) > 1 or name in plan.stacks}
    if len(many) < len(plan.sources):
        yield plan.only(lambda name: name not in many)
    for name in plan.sources:
        if name in many:
            yield plan.only(name.__eq__)


def _file(checkpoint: Checkpoint, plan: WeightPlan, name: str) -> str:
    keys = plan.sources.get(name) or plan.keys()
    return str(checkpoint.info(keys[0]).file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar, which would start anew for each block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
