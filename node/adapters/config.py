"""What an ``adapter_config.json`` of PEFT asks for, and whether that can be served. Pure functions of plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.errors import ModelError, UsageError

_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_alpha"),
    *("lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "task_type", "use_rslora", "eva_config", "ensure_weight_tying"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
}
"""Settings that say nothing which the names, shapes and numbers that are looked at don't say."""

_CHANGES = {
    "alora_invocation_tokens": "activated LoRA, which depends on the tokens",
    "arrow_config": "routing between adapters (Arrow)",
    "layer_replication": "layers that are there several times",
    "lora_bias": "biases",
    "modules_to_save": "whole modules beside LoRA",
    "target_parameters": "LoRA on parameters, such as stacked experts",
    "trainable_token_indices": "new embeddings of tokens",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
"""What some settings stand for, in words."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as asked for: its ``name`` in the swarm, and ``where`` its files are, a directory or a Hub id."""

    name: str
    where: str
    revision: str | None = None


def parse_spec(text: str) -> AdapterSpec:
    """``[NAME=]DIR``, or ``[NAME=]ID[@REVISION]``; the name is by default that of the directory, or the Hub id, as in
    Petals.

    Raises:
        UsageError: it has no name, or one that can't be told apart in a list.
    """
    given, equals, where = text.partition("=")
    if not equals or Path(text).expanduser().is_dir():
        equals, where = "", text
    revision = None
    path = Path(where).expanduser()
    if path.is_dir():
        default = path.resolve().name
    else:
        where, _, revision = where.partition("@") if "@" in where else (where, "", None)
        default = where
    name = given if equals else default
    if not where or not name or len(name) > 256 or re.search(r"[\s,]", name):
        raise UsageError(
            f"--adapters {text!r}: give a directory or a Hub id, or NAME=DIR_OR_ID with a name of one word"
        )
    return AdapterSpec(name, where, revision)


def parse_specs(texts: tuple[str, ...]) -> tuple[AdapterSpec, ...]:
    """All adapters of a node.

    Raises:
        UsageError: as :func:`parse_spec`, or two have one name.
    """
    specs = tuple(map(parse_spec, texts))
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two --adapters are called {twice[0]!r}: name one of them differently with NAME=DIR_OR_ID")
    return specs


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter's numbers: ``rank`` and ``alpha``, and those of some modules by patterns of their names.

    Attributes:
        rank_stabilized: scale by the square root of the rank (rsLoRA, Kalajdzievski, 2023).
        targets: names of modules that must have tensors; empty where the config says it in another way.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    targets: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank that the module (by its whole name in the model) has."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the module's two matrices is multiplied with."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def wants(self, module: str) -> bool:
        """Whether the config says plainly that this module has an adapter."""
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(_whole(key), module)), default)


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def read_config(raw: Any, where: str) -> AdapterConfig:
    """Checks what ``adapter_config.json`` holds. ``where`` names the adapter in errors.

    Settings that are not known are refused too, unless they are off: new versions of PEFT have new ones, and what
    they change would be missing without a sign.

    Raises:
        ModelError: it is no LoRA adapter, it asks for what can't be served, or its numbers make no sense.
    """
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind != "LORA":
        raise ModelError(f"adapter {where} is of peft_type {kind!r}: only LORA can be served")
    for name, value in raw.items():
        if name == "bias" and value not in ("none", None):
            raise _unserved(where, f"trained biases (bias={value!r})")
        if name == "init_lora_weights" and not (isinstance(value, bool) or value is None or value in _PLAIN_STARTS):
            raise ModelError(
                f"adapter {where} was begun with init_lora_weights={value!r}, which changes the base weights too: save "
                "it as plain LoRA with save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )
        if name not in (*_HARMLESS, "bias", "init_lora_weights") and value not in (None, False, "", [], {}):
            raise _unserved(where, _CHANGES.get(name, f"{name}={value!r}"))
    try:
        rank, alpha = _rank(raw.get("r", 8)), float(raw.get("lora_alpha", 8))
        rank_pattern = {_pattern(key): _rank(value) for key, value in (raw.get("rank_pattern") or {}).items()}
        alpha_pattern = {_pattern(key): float(value) for key, value in (raw.get("alpha_pattern") or {}).items()}
        if not all(map(math.isfinite, (alpha, *alpha_pattern.values()))):
            raise ValueError("an alpha is not finite")
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise ModelError(f"adapter_config.json of adapter {where} makes no sense: {error}") from error
    targets = raw.get("target_modules")
    some = any(raw.get(name) is not None for name in ("exclude_modules", "layers_to_transform"))
    plain = isinstance(targets, list) and all(isinstance(target, str) for target in targets) and not some
    return AdapterConfig(
        rank, alpha, rank_pattern, alpha_pattern, bool(raw.get("use_rslora")), tuple(targets or ()) if plain else ()
    )


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"the rank {value!r} is not a positive whole number")
    return value


def _pattern(key: str) -> str:
    re.compile(_whole(key))
    return key


def _unserved(where: str, what: str) -> ModelError:
    return ModelError(f"adapter {where} has {what}, which can't be served: only plain LoRA on linear layers can")
