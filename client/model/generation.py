"""A ``generate()`` under way: what can't be asked of it, and the sessions that it opens beside its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig

from swarm.compat.generation import ASSISTED, GenerationMode

from ..ends.cache import SwarmCache

if TYPE_CHECKING:
    from ..ends.remote_blocks import RemoteBlocks
    from ..session.swarm_connection import SwarmConnection
    from .model_session import ModelSession

_CURRENT: ContextVar[Generation | None] = ContextVar("swarm_generation", default=None)


class Generation:
    """Within its ``with``, ``cache`` is at work in this thread.

    Code that ``generate()`` calls may itself call the model, and want a cache there: that of classifier-free guidance
    does so for the negative prompt. It gets one for as long as the generation lasts, with room for as many columns more
    as this one may still take.
    """

    def __init__(self, cache: SwarmCache) -> None:
        self.cache = cache
        self._beside: list[SwarmCache] = []
        self._outer = cache.generating  # by a generate() that calls another for the same cache
        self._token: Token[Generation | None] | None = None

    def __enter__(self) -> Generation:
        self._token = _CURRENT.set(self)
        self.cache.generating = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.cache.generating = self._outer
        if not self._outer:
            self.cache.needed = 0
        if self._token is not None:
            _CURRENT.reset(self._token)
        for cache in self._beside:
            cache.close()

    def open_beside(self, blocks: RemoteBlocks, columns: int) -> SwarmCache:
        """A cache for a pass of ``columns`` over ``blocks``, and one more for each token that is still to come."""
        cache = open_cache(blocks.connection, columns + self.cache.needed - self.cache.get_seq_length())
        self._beside.append(cache)
        return cache


def current_generation() -> Generation | None:
    """The innermost ``generate()`` that this code is called from, with the cache that it has asked for, if any."""
    return _CURRENT.get()


def open_cache(connection: SwarmConnection, max_length: int | None, *, remember: bool = False) -> SwarmCache:
    """A cache over all blocks of a model, with the adapter that is active now. Opens nothing yet."""
    adapter = connection.active_adapter
    return SwarmCache(
        lambda length: connection.session(max_length=length, adapter=adapter), max_length, remember=remember
    )


def choose_cache(
    session: ModelSession | None, opened: ModelSession | None, given: SwarmCache | None
) -> tuple[SwarmCache | None, bool]:
    """The cache that a ``generate()`` goes on in, None for one of its own; and whether it is handed on to it by another
    that is at work in it, and calls it as a part of that.

    Args:
        session, given: what the caller names.
        opened: the session whose ``with`` is open. What a ``generate()`` calls may generate too, but then not in there.

    Raises:
        ValueError: another ``generate()`` is at work in what the caller names.
    """
    if session is None and given is None:
        return (opened.cache, False) if opened is not None and not opened.cache.generating else (None, False)
    cache = given if session is None else session.cache
    generation = _CURRENT.get()
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
