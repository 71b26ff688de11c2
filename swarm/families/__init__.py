"""What a family of models needs beyond the generic path, looked up by the config's ``model_type``."""

from __future__ import annotations

from swarm.families.base import ATTENTION, Family
from swarm.families.bloom import BloomFamily
from swarm.families.falcon import FalconFamily
from swarm.families.falcon_h1 import FalconH1Family
from swarm.families.gptj import GPTJFamily
from swarm.families.llama4 import Llama4Family

__all__ = ["ATTENTION", "Family", "family_of"]

_FAMILIES: dict[str, type[Family]] = {
    "bloom": BloomFamily,
    "falcon": FalconFamily,
    "falcon_h1": FalconH1Family,
    "gptj": GPTJFamily,
    "llama4_text": Llama4Family,
}


def family_of(model_type: str) -> Family:
    """The family that runs models of this type. Types that aren't known take the generic path."""
    return _FAMILIES.get(model_type, Family)()
