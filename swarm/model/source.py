"""From what the user typed as MODEL to a model that can be loaded: its config, its sizes and its name in the DHT."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from ..errors import ModelError
from ..weights.checkpoint import require_safetensors
from ..weights.dequantize import Quantization, quantization_of
from ..weights.hub.one_file import HubRepo
from ..wire.dht_prefix import check_dht_prefix, default_dht_prefix
from .model_source import ModelSource
from .open_checkpoint import open_checkpoint

if TYPE_CHECKING:
    from ..weights.sharing.store import WeightStore

BUNDLED = ("demo", "demo-draft")
"""Names of the small models that come with the package."""


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    dht_prefix: str | None = None,
) -> ModelSource:
    """The model that ``model`` names: a local directory or GGUF file, ``demo`` or ``demo-draft``, or a Hub id, tried in
    this order.

    Only a Hub id touches the network, and only for the config (weights are fetched when they are loaded).

    Raises:
        ModelError: not found, no config, no weights in safetensors form, or an architecture that can't be used.
        UsageError: ``dht_prefix`` has a dot or a space.

    Example:
        >>> source = resolve("meta-llama/Llama-3.1-8B")
        >>> source.num_blocks, source.dht_prefix
        (32, 'Llama-3-1-8B-hf')
    """
    if model.endswith(".gguf") and (file := Path(model).expanduser()).is_file():
        return _gguf_source(model, file.resolve(), dht_prefix)
    directory = _local_directory(model)
    if directory is not None:
        hub = None
        if not (directory / "config.json").is_file():
            raise ModelError(f"no config.json in {directory}: give the directory of a transformers model")
        require_safetensors(directory)
    else:
        hub, directory = _hub_directory(HubRepo(model, revision, token, cache_dir))
    config, quantization = _read_config(model, directory)

    prefix = _dht_prefix(dht_prefix, directory.name if hub is None else model, config)
    return _with_dtype(ModelSource(model, directory, config, prefix, torch.bfloat16, hub, quantization))


def is_here(model: str) -> bool:
    """Whether ``model`` is a path on this machine, or comes with the package: then it isn't looked up elsewhere."""
    return model in BUNDLED or model.startswith(("/", "./", "../", "~")) or Path(model).expanduser().exists()


def resolve_store(model: str, store: WeightStore, dht_prefix: str) -> ModelSource:
    """The model whose weights come from peers into ``store``, where its config is already.

    Raises:
        ModelError: no config, or an architecture that can't be used.
    """
    config, quantization = _read_config(model, store.directory)
    return _with_dtype(
        ModelSource(model, store.directory, config, dht_prefix, torch.bfloat16, None, quantization, store)
    )


def _with_dtype(source: ModelSource) -> ModelSource:
    if isinstance(source.config.dtype, torch.dtype):
        return replace(source, dtype=source.config.dtype)
    if source.quantization is not None:  # most tensors are integers
        return source
    return replace(source, dtype=open_checkpoint(source).main_dtype())


def _gguf_source(model: str, file: Path, dht_prefix: str | None) -> ModelSource:
    from ..weights.gguf_file import read_gguf_config

    config, dtype, kind = read_gguf_config(file)
    prefix = _dht_prefix(dht_prefix, file.stem, config)
    quantization = Quantization(f"GGUF {kind}", ()) if kind is not None else None
    return ModelSource(model, file, config, prefix, dtype, quantization=quantization)


def _dht_prefix(asked: str | None, name: str, config: PreTrainedConfig) -> str:
    return default_dht_prefix(name, config.model_type) if asked is None else check_dht_prefix(asked)


def _local_directory(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if model in BUNDLED:
        bundled = Path(str(resources.files("swarm"))) / "data" / model
        if bundled.is_dir():
            return bundled
        raise ModelError(f"model {model!r} is missing from this installation: install the package again")
    if model.startswith(("/", "./", "../", "~")) or not model:
        raise ModelError(f"there is no directory or GGUF file {model!r}")
    return None


def _hub_directory(repo: HubRepo) -> tuple[HubRepo, Path]:
    config_file = repo.fetch("config.json")
    if config_file is None:
        raise ModelError(f"no config.json in {repo.name!r} on the Hub: it is not a transformers model")
    # The cache keeps a snapshot in a folder named after its commit. With the commit pinned, weights that are fetched
    # later belong to this config even if somebody pushes in between, and cached ones need no network.
    return replace(repo, revision=config_file.parent.name), config_file.parent


def _read_config(model: str, directory: Path) -> tuple[PreTrainedConfig, Quantization | None]:
    file = directory / "config.json"
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {file}: {error}") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise ModelError(f"{file} has no model_type: it is not the config of a transformers model")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model {model!r} is of type {model_type!r}, which this version of transformers does not know: "
            "upgrade transformers (code that comes with a model is not run). docs/models.md lists what works"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a config's own checks raise all sorts
        raise ModelError(f"can't use {file}: {str(error).strip().splitlines()[0]}") from error
    config = config.get_text_config(decoder=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model {model!r} is of type {model_type!r}, which is not a causal language model")
    quantization = quantization_of(model, raw.get("quantization_config") or _quantization_config(config))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or the model's class would be built for packed weights
    return config, quantization


def _quantization_config(config: PreTrainedConfig) -> Any:
    """Of a text model within another. A dictionary, or an object that can be made one."""
    found: Any = getattr(config, "quantization_config", None)
    return found.to_dict() if hasattr(found, "to_dict") else found
