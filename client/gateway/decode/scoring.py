"""Log-probabilities of a prompt, which programs that evaluate models ask for (``echo`` with ``logprobs``)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import torch
from torch import Tensor

from ...ends.model_ends import ModelEnds
from .generation import Scored, TokenLogprobs
from .sampling import top_logprobs

_ROWS = 64
"""Tokens at a time: their logits over the whole vocabulary are large, and others' tokens wait for no more than them."""


async def score_prompt(
    ends: ModelEnds,
    compute: Callable[[partial[list[TokenLogprobs]]], Awaitable[list[TokenLogprobs]]],
    prompt: tuple[int, ...],
    hidden: Tensor,
    count: int,
) -> Scored:
    """The log-probability of each token of ``prompt`` by those before it, and the ``count`` likeliest in its place.

    Args:
        compute: runs work in the thread for torch.
        hidden: the last block's output for the prompt, ``[1, tokens, H]``.
    """
    scores = [TokenLogprobs(None, ())]  # nothing is before the first
    for start in range(0, len(prompt) - 1, _ROWS):
        following = prompt[start + 1 : start + 1 + _ROWS]
        scores += await compute(partial(_score, ends, hidden[0, start : start + len(following)], following, count))
    return Scored(tuple(scores))


@torch.inference_mode()
def _score(ends: ModelEnds, hidden: Tensor, following: tuple[int, ...], count: int) -> list[TokenLogprobs]:
    logits = ends.logits(hidden)
    most = min(count, logits.shape[-1])
    own, ids, values = (part.tolist() for part in top_logprobs(logits, torch.tensor(following), most))
    return [
        TokenLogprobs(logprob, tuple(zip(likeliest, likely, strict=True)))
        for logprob, likeliest, likely in zip(own, ids, values, strict=True)
    ]
