"""Filling parts of a meta-device model from a checkpoint, with transformers' own renames and conversions.

A checkpoint's names are not always the model's: old names, names without the base model's prefix, experts that are
stored one by one and live fused. transformers has rules for all that, which are applied here to exactly the tensors
that are wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compat.loading import Rules, convert_into, in_text_model, natural_key
from ..compute.memory import trim
from ..errors import ModelError
from .checkpoint import Checkpoint
from .stacking import LazyStack


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
    rules = Rules(model)
    sources: defaultdict[str, list[str]] = defaultdict(list)
    columns: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    converted: set[str] = set()
    for key in sorted(checkpoint.files, key=natural_key):
        name, pattern = rules.rename(key)
        if name is None:
            continue
        sources[name].append(key)
        if pattern is not None:
            converted.add(name)
            if rules.stacked_kinds(pattern) is not None:
                columns[name][pattern].append(key)
    stacks = {}
    for name, found in columns.items():
        kinds = rules.stacked_kinds(next(iter(found))) or ()
        stacks[name] = tuple(tuple(found[kind]) for kind in kinds)
    return WeightPlan({name: tuple(keys) for name, keys in sources.items()}, stacks, frozenset(converted))


def make_module_finder(model: PreTrainedModel) -> Callable[[str], tuple[str | None, bool]]:
    """From the name that a module with weights has in some version of transformers to its name in ``model``, and
    whether it is only a part of that there (an expert of those stacked in one tensor); None if there is none."""
    rules, own = Rules(model), model.state_dict()

    def find(module: str) -> tuple[str | None, bool]:
        key = f"{module}.weight"
        name, pattern = (key, None) if key in own else rules.rename(key)
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
                tensors |= {in_text_model(key, own): checkpoint.lazy(key, mapped=mapped) for key in keys}
        loaded = convert_into(model, tensors, dtype=dtype, device=device, convert=not group.stacks)
        for name, found, expected in loaded.mismatched:
            raise ModelError(
                f"tensor {name} has shape {list(found)} in {_file(checkpoint, group, name)}, but the model's config "
                f"asks for {list(expected)}: config.json and weights don't belong together"
            )
        for name in loaded.failed:
            raise ModelError(
                f"tensor {name} can't be made from what is in {_file(checkpoint, group, name)}: "
                "parts of it are missing or have the wrong shape"
            )
        missing &= loaded.missing
        trim()
    return missing


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


def require_none(checkpoint: Checkpoint, missing: list[str]) -> None:
    """Raises ModelError for weights that the model needs and the checkpoint lacks: ``missing``."""
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"tensor {missing[0]}{more} is missing from {checkpoint.listing}: the checkpoint is incomplete"
        )
