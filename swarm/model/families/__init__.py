"""What a family of models needs beyond the generic path, looked up by the config's ``model_type``."""

from __future__ import annotations

from .base import ATTENTION, Family
from .bloom import BloomFamily
from .falcon import FalconFamily
from .falcon_h1 import FalconH1Family
from .gemma import Gemma3nFamily, Gemma4Family
from .gptj import GPTJFamily
from .latent import LatentFamily
from .llama4 import Llama4Family

__all__ = ["ATTENTION", "REFUSED", "Family", "family_of"]

_FAMILIES: dict[str, type[Family]] = {
    "bloom": BloomFamily,
    "deepseek_v2": LatentFamily,
    "deepseek_v3": LatentFamily,
    "falcon": FalconFamily,
    "falcon_h1": FalconH1Family,
    "gemma3n_text": Gemma3nFamily,
    "gemma4_text": Gemma4Family,
    "gemma4_unified_text": Gemma4Family,
    "glm4_moe_lite": LatentFamily,
    "gptj": GPTJFamily,
    "llama4_text": Llama4Family,
}

REFUSED: dict[str, str] = {}
"""Types of models that can't be served, and why, where that doesn't show when a block is tried."""


def family_of(model_type: str) -> Family:
    """The family that runs models of this type. Types that aren't known take the generic path."""
    return _FAMILIES.get(model_type, Family)()
