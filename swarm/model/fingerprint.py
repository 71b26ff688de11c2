"""Tells models of different shape apart that are announced under one name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
    "new_decoder_architecture",
    "vocab_size",
)


def fingerprint(config: Any) -> str:
    """16 hex digits that depend on what decides the shapes of a model's weights. ``config`` is one of transformers."""
    shape = {name: _field(config, name) for name in _SHAPE_FIELDS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def _field(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' for what differs between layers; what is in the config's file is as good here
        return vars(config).get(name)
