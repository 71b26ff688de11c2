"""What ``generate()`` asks a model for in private."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .keywords import GENERATE_KEYWORD

ASSISTED = GenerationMode.ASSISTED_GENERATION

__all__ = ["ASSISTED", "BaseStreamer", "GenerateHooks", "GenerateRequest", "GenerationMode"]


@dataclass(frozen=True)
class GenerateRequest:
    """A ``generate()`` that is about to begin.

    Attributes:
        config: what is asked for, with all defaults filled in.
        cache: what ``generate()`` was given as its cache.
        rows: of each step.
        columns: the most that there will be in the end, prompt included.
    """

    config: GenerationConfig
    mode: GenerationMode
    cache: Any
    rows: int
    columns: int


class GenerateHooks:
    """Mixed in before a model's class: hands on what ``generate()`` asks for in private, in words of ours."""

    def begin_generation(self, request: GenerateRequest) -> bool:
        """Before the first step; whether the cache is to be used."""
        raise NotImplementedError

    def adapt_candidates(self, generator: Any, config: GenerationConfig) -> None:
        """Before what guesses tokens for assisted generation (``get_candidates``) is asked for the first."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        request = GenerateRequest(
            generation_config, generation_mode, model_kwargs[GENERATE_KEYWORD], rows, max_cache_length
        )
        if not self.begin_generation(request):
            del model_kwargs[GENERATE_KEYWORD]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        self.adapt_candidates(generator, kwargs["generation_config"] if "generation_config" in kwargs else args[0])
        return generator
