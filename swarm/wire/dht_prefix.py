"""The name of a model in the DHT."""

from __future__ import annotations

from ..errors import UsageError


def default_dht_prefix(model: str, model_type: str) -> str:
    """The name under which Petals 2.2 announces ``model`` too, so that both can serve one swarm.

    Petals' rule differs by family: BLOOM keeps the owner and gets a suffix from Petals' early days, the others go by
    the last part of the name only (copies of one model under several owners make one swarm), Llama always with "-hf".
    """
    prefix = f"{model}-petals" if model_type == "bloom" else model.rstrip("/").split("/")[-1]
    prefix = "-".join(prefix.replace(".", "-").split())
    if model_type == "llama" and not prefix.endswith("-hf"):
        prefix += "-hf"
    return prefix


def check_dht_prefix(asked: str) -> str:
    """Raises UsageError if it can't be one."""
    if not asked or "." in asked or any(character.isspace() for character in asked):
        raise UsageError(f"a DHT prefix can't be empty or hold dots or spaces; got {asked!r}")
    return asked
