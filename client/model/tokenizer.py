"""The tokenizer of a model that has been loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from swarm.errors import UsageError

if TYPE_CHECKING:
    from .facade import SwarmModelForCausalLM


def load_tokenizer(model: SwarmModelForCausalLM, name: str) -> PreTrainedTokenizerBase:
    """That of ``model``, which the user calls ``name``.

    Raises:
        UsageError: it has none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.files)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} has no tokenizer that can be loaded: {error}") from error
    return tokenizer
