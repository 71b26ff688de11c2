"""Additive attention masks: causality with a past, sliding windows, and ALiBi."""

from __future__ import annotations

import torch


def build_mask(
    *,
    first_query: int,
    queries: int,
    first_key: int,
    keys: int,
    window: int | None,
    slopes: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What is added to the logits of ``queries`` tokens from position ``first_query`` on over ``keys`` tokens from
    position ``first_key`` on: ``[queries, keys]``, or ``[heads, queries, keys]`` with ALiBi ``slopes`` (``[heads]``).

    A key is seen if it isn't later than the query and, with a ``window``, less than ``window`` positions before it.
    """
    query_at = torch.arange(first_query, first_query + queries, device=device)[:, None]
    key_at = torch.arange(first_key, first_key + keys, device=device)[None, :]
    distance = key_at - query_at
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    if slopes is None:
        mask = torch.zeros(queries, keys, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf"))
    # Products round in the dtype of the slopes, as the models' own do. What the query's own position adds is the same
    # for all keys, so softmax doesn't see it go, and what is left is small, so exact in any dtype, where it matters
    slopes = slopes.detach()[:, None, None]
    bias = (slopes * key_at).float() - (slopes * query_at).float()
    return bias.masked_fill_(hidden, float("-inf")).to(dtype)
