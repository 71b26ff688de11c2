"""Using a swarm: the model facade, sessions and routing, and the ``swarm`` command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from swarm.compute.openmp import set_waiting

if TYPE_CHECKING:
    from .ends.remote_blocks import RemoteBlocks
    from .model.facade import SwarmModelForCausalLM
    from .model.model_session import ModelSession
    from .settings import ClientSettings

__all__ = ["ClientSettings", "ModelSession", "RemoteBlocks", "SwarmModelForCausalLM"]

_HOMES = {
    "ClientSettings": "settings",
    "ModelSession": "model.model_session",
    "RemoteBlocks": "ends.remote_blocks",
    "SwarmModelForCausalLM": "model.facade",
}


if "torch" not in sys.modules:
    set_waiting()


def __getattr__(name: str) -> Any:
    # On first use, because torch and transformers take seconds to import and the command line often needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
