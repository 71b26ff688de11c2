"""All of a model but its blocks, for a client."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..compat.building import tie
from ..errors import UsageError
from ..weights.filling import load_weights, plan_weights, require_none
from .families import family_of
from .model_source import ModelSource
from .open_checkpoint import open_checkpoint
from .skeleton import build_skeleton, fill_buffers_of


def load_ends(source: ModelSource, *, dtype: torch.dtype | str = "checkpoint") -> PreTrainedModel:
    """The whole model's class with everything but its blocks: embeddings, final norm, head.

    The list of blocks is there, and empty. Weights are memory-mapped and, where ``dtype`` is that of the file, never
    copied. Tied weights are tied.

    Args:
        dtype: ``"checkpoint"`` for the checkpoint's own.

    Raises:
        ModelError: the weights can't be loaded.
    """
    chosen = source.dtype if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and dtype != "checkpoint":
        raise UsageError(f"dtype is a torch.dtype or 'checkpoint'; got {dtype!r}")
    skeleton = build_skeleton(source, chosen)
    model = skeleton.model
    checkpoint = open_checkpoint(source)
    plan = plan_weights(model, checkpoint)
    skeleton.empty_layers()
    plan = plan.only(set(model.state_dict()).__contains__)
    checkpoint.fetch(plan.keys())
    device = torch.device("cpu")
    fill_buffers_of(model, model, device, family_of(source.model_type))
    missing = load_weights(model, plan, checkpoint, dtype=chosen, device=device, mapped=True)
    tie(model, missing)
    require_none(checkpoint, sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta))
    checkpoint.close()
    if model.can_generate():
        _read_generation_config(model, source)
    return model.requires_grad_(False).eval()


def _read_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """The model's own defaults for ``generate()``, as ``from_pretrained`` reads them."""
    directory = source.path
    if source.hub is not None:
        source.hub.fetch("generation_config.json")
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
