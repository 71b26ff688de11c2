"""Tiny checkpoints that transformers 4.34, which Petals needs, reads as the same models as the version of today."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_model

_ROOT = tempfile.TemporaryDirectory(prefix="swarm-test-petals-")


@functools.cache
def shared_model(like: str) -> Path:
    """The directory of a tiny model, one of the presets of :mod:`tests.models`, for both sides to read."""
    # Petals takes a BLOOM checkpoint as the Hub has it: blocks are named h.*, and the head is tied
    options = {"tie_word_embeddings": True} if like == "bloom" else {}
    path = Path(_ROOT.name) / like
    # without an end token: transformers 4.34 can't be told to ignore it
    shutil.copytree(tiny_model(like, positions=2048, eos_token_id=None, **options), path)
    write_old_fields(path)
    if like == "bloom":
        tensors = load_file(path / "model.safetensors")
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        _quieten_embeddings(renamed)
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _quieten_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    """With a tied head, random text is one token over and over unless what blocks add is louder than the embeddings."""
    embeddings = tensors["word_embeddings.weight"]
    tensors["word_embeddings.weight"] = embeddings / embeddings.norm(dim=1, keepdim=True) * 8
    for name, tensor in tensors.items():
        if name.startswith("word_embeddings_layernorm"):
            tensor.mul_(0.1)
        elif name.startswith("h.") and tensor.dim() > 1:
            tensor.mul_(4)
        elif name.startswith("ln_f"):
            tensor.fill_(float(name.endswith("weight")))


def write_old_fields(path: Path) -> None:
    """Gives ``config.json`` the fields of transformers 4.34 beside those of today."""
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config["dtype"]
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (path / "config.json").write_text(json.dumps(config, indent=1))
