"""What ``generate()`` asks a model for in private."""

from __future__ import annotations

from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

ASSISTED = GenerationMode.ASSISTED_GENERATION

__all__ = ["ASSISTED", "BaseStreamer", "GenerationMode"]
