"""Tiny checkpoints that transformers 4.34, which Petals needs, reads as the same models as the version of today."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.models import tiny_model

_ROOT = tempfile.TemporaryDirectory(prefix="swarm-test-petals-")


@functools.cache
def shared_model(like: str) -> Path:
    """The directory of a tiny model, one of the presets of :mod:`tests.models`, for both sides to read."""
    # Petals takes a BLOOM checkpoint as the Hub has it: blocks are named h.*, and the head is tied
    options = {"tie_word_embeddings": True} if like == "bloom" else {}
    path = Path(_ROOT.name) / like
    shutil.copytree(tiny_model(like, positions=2048, **options), path)
    write_old_fields(path)
    if like == "bloom":
        tensors = load_file(path / "model.safetensors")
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        # with a tied head, random text is one token over and over unless what the blocks add is louder than the embeddings
        renamed["word_embeddings_layernorm.weight"] *= 0.1
        renamed["word_embeddings_layernorm.bias"] *= 0.1
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_old_fields(path: Path) -> None:
    """Gives ``config.json`` the fields of transformers 4.34 beside those of today."""
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config["dtype"]
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (path / "config.json").write_text(json.dumps(config, indent=1))
