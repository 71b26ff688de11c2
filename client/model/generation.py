"""What ``generate()`` can be asked for over a swarm, and the cache that it goes on in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from swarm.compat.generation import ASSISTED, GenerationMode

from ..ends.cache import SwarmCache
from ..ends.generating import current_generation


def choose_cache(
    session: SwarmCache | None, opened: SwarmCache | None, given: SwarmCache | None
) -> tuple[SwarmCache | None, bool]:
    """The cache that a ``generate()`` goes on in, None for one of its own; and whether it is handed on to it by another
    that is at work in it, and calls it as a part of that.

    Args:
        session, given: what the caller names: the cache of a session, or a cache.
        opened: of the session whose ``with`` is open. What a ``generate()`` calls may generate too, but then not there.

    Raises:
        ValueError: another ``generate()`` is at work in what the caller names.
    """
    if session is None and given is None:
        return (opened, False) if opened is not None and not opened.generating else (None, False)
    cache = given if session is None else session
    generation = current_generation()
    handed_on = generation is not None and given is not None and given is generation.cache
    if cache is not None and cache.generating and not handed_on:
        raise ValueError("a generate() is at work in this session: open another with model.session(max_length=…)")
    return cache, handed_on


def resume(
    cache: SwarmCache, inputs: Tensor | None, config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> None:
    """Make the cache hold nothing but a beginning of what is about to be passed to ``generate()``.

    Raises:
        ValueError: ``attention_mask`` is longer than the ids, but not by what the cache holds.
    """
    ids = kwargs.get("inputs", kwargs.get("input_ids")) if inputs is None else inputs
    mask = kwargs.get("attention_mask")
    cache.only_new_ids = False
    if kwargs.get("inputs_embeds") is not None or ids is None:
        cache.reset()  # embeddings can't be compared with what was seen
    elif kwargs.get("token_healing", getattr(config, "token_healing", None)):
        cache.reset()  # nor are these the ids that will come
    elif kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)):
        cache.reset()  # some versions of transformers count the pieces of a prompt from its first token
    elif mask is not None and mask.shape[-1] > ids.shape[-1]:
        if mask.shape[-1] != cache.get_seq_length() + ids.shape[-1]:
            raise ValueError(
                f"attention_mask has {mask.shape[-1]} columns, but {cache.get_seq_length()} are done and "
                f"{ids.shape[-1]} are new. Simplest is to pass all ids so far, and a mask of the same shape"
            )
        cache.only_new_ids = True
    else:
        cache.resume(ids, mask)


def refuse_unserved(config: GenerationConfig, mode: GenerationMode, defaults: GenerationConfig | None) -> None:
    """
    Args:
        config: what is asked for, with all defaults filled in.
        defaults: the model's own, which a caller need not know.

    Raises:
        ValueError: it can't be had from a swarm.
    """
    assisted = mode == ASSISTED
    other = "pass an assistant_model or prompt_lookup_num_tokens instead"
    if config.is_assistant:
        raise ValueError("the assistant guesses tokens one by one, so it has to be a model on this machine")
    if assisted and config.assistant_early_exit is not None:
        raise ValueError(
            f"assistant_early_exit wants the first blocks alone, a route goes through all of them: {other}"
        )
    if assisted and config.use_mtp:
        raise ValueError(f"use_mtp wants hidden states from inside the model, which stay on the nodes: {other}")
    if assisted and config.guidance_scale not in (None, 1):
        raise ValueError(
            "guidance_scale doesn't go with an assistant or prompt lookup: the negative prompt would be continued by "
            "guesses that were not accepted"
        )
    if config.cache_implementation not in (None, getattr(defaults, "cache_implementation", None)):
        raise ValueError("cache_implementation can't be chosen: the cache is on the nodes of the swarm")


def limit_candidates(generator: Any, columns: int) -> None:
    """Cut what a candidate generator of transformers guesses to ``columns`` in all, prompt included: what is guessed
    beyond the end would need room on the nodes, and positions that the model may not have.

    Raises:
        ValueError: it guesses from hidden states.
    """
    if getattr(generator, "requires_model_outputs", False):
        raise ValueError("this assistant wants hidden states from inside the model, which stay on the nodes")
    guess = generator.get_candidates

    @functools.wraps(guess)
    def guess_within(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = guess(input_ids, *args, **kwargs)
        end = max(columns, input_ids.shape[1])
        return ids[:, :end], None if logits is None else logits[:, : end - input_ids.shape[1]]

    generator.get_candidates = guess_within
