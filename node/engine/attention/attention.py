"""Attention over a batch: the function that the blocks' transformers modules call as ``swarm_paged``.

Query heads that share a key head are never given copies of it. A row with one new token (decode) has them as the
queries of one small attention without a mask; longer rows have them as heads that all look at the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from swarm.compat.attention import register_attention

from .batch import Batch, DenseBatch, Segment, ShortRows
from .chunks import in_chunks
from .masks import build_mask
from .paged_attention import paged_attention

NAME = "swarm_paged"
_LARGEST_SCORES = 1 << 24  # elements of a mask, or of a score matrix, that are made at once


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    batch: Batch | DenseBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    attention_chunk: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` ``[1, heads, N, key_dim]``, ``key`` and ``value`` ``[1, kv_heads, N, dim]`` of the tokens in ``batch``;
    returns ``[1, N, heads, value_dim]`` and, for transformers, ``None``.

    ``alibi`` are slopes ``[heads]``, ``s_aux`` the logits ``[heads]`` of sinks that take weight but have no value.
    With ``attention_chunk`` a query sees keys only of its own chunk of so many positions.
    ``attention_mask`` is ignored: the batch knows who sees whom.
    """
    rule = _Rule(scaling, sliding_window, softcap or None, alibi, s_aux)
    if isinstance(batch, DenseBatch):
        return _dense(query, key, value, batch, rule, attention_chunk), None
    keys, values = batch.cache.keys[module.layer_idx], batch.cache.values[module.layer_idx]  # type: ignore[index]
    _keep(key, value, keys, values, batch)
    if batch.paged is not None and rule.plain and attention_chunk is None and batch.cache.in_kernel(keys, values):
        assert batch.cache.kernel is not None
        flat = query[0].transpose(0, 1)
        options: dict[str, Any] = {"page_size": batch.cache.page_size, "scale": rule.scale, "window": rule.window}
        return paged_attention(batch.cache.kernel, flat, keys, values, batch.paged, **options)[None], None
    if not batch.rows:
        raise NotImplementedError("only attention by the kernel has static shapes")
    return _row_by_row(query, keys, values, batch, rule, attention_chunk), None


class _Rule:
    """How one block attends, whatever the tokens."""

    __slots__ = ("fusable", "plain", "scale", "sinks", "slopes", "softcap", "window")

    def __init__(
        self,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self.scale, self.window, self.softcap, self.slopes, self.sinks = scale, window, softcap, slopes, sinks
        self.fusable = softcap is None and sinks is None  # no fused kernel has a cap or sinks
        self.plain = self.fusable and slopes is None

    def first_key(self, past: int) -> int:
        """The first position that a query at ``past`` sees."""
        return 0 if self.window is None else max(0, past - self.window + 1)


def _keep(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> None:
    """Puts ``key`` and ``value`` of the tokens in ``batch`` into the pools."""
    if batch.run is not None:
        keys.narrow(2, batch.run, key.shape[2]).copy_(key.transpose(0, 1))
        values.narrow(2, batch.run, key.shape[2]).copy_(value.transpose(0, 1))
    else:
        assert batch.slots is not None
        keys.index_copy_(2, batch.slots, key.transpose(0, 1))
        values.index_copy_(2, batch.slots, value.transpose(0, 1))


def _row_by_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, rule: _Rule, chunk: int | None
) -> torch.Tensor:
    """``query`` ``[1, heads, N, key_dim]`` over the pools; ``[1, N, heads, value_dim]``. Rows that are short enough go
    together."""
    segments, short = batch.segments, batch.short
    if chunk is not None and (cut := in_chunks(segments, chunk)) is not segments:
        segments, short = cut, None
    _, heads, tokens, dim = query.shape
    kv_heads = keys.shape[0]
    if tokens == 1:  # as in most steps of a single stream, for which every call counts
        one = query.reshape(kv_heads, 1, heads // kv_heads, dim)
        return _decode(one, keys, values, batch, segments[0], rule).reshape(1, 1, heads, values.shape[3])
    folded = query.transpose(1, 2).reshape(tokens, kv_heads, 1, heads // kv_heads, dim)
    parts: list[torch.Tensor] = []
    together = 0
    if short is not None and rule.plain and rule.window is None:
        together = short.count
        parts.append(_decode_together(folded[:together].squeeze(2), keys, values, short, rule))
    for segment in segments[together:]:
        if segment.end - segment.begin == 1:
            part = _decode(folded[segment.begin], keys, values, batch, segment, rule)
        else:
            part = _prefill(folded[segment.begin : segment.end], keys, values, batch, segment, rule)
        parts.append(part)
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.reshape(1, tokens, heads, values.shape[3])


def _seen(keys: torch.Tensor, values: torch.Tensor, segment: Segment, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of ``segment`` from the position ``first`` on: views where they can be."""
    if segment.index is None:
        start, count = segment.base + first, segment.length - first
        return keys.narrow(2, start, count), values.narrow(2, start, count)
    index = segment.index[first : segment.length]
    return keys.index_select(2, index), values.index_select(2, index)


def _decode_together(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: ShortRows, rule: _Rule
) -> torch.Tensor:
    """``query`` ``[N, kv_heads, group, key_dim]``, a row each; returns ``[N, kv_heads, group, value_dim]``."""
    count = len(query)

    def gathered(pool: torch.Tensor) -> torch.Tensor:  # [kv_heads, 1, slots, dim] -> [rows, kv_heads, longest, dim]
        return pool[:, 0].index_select(1, rows.index).unflatten(1, (count, -1)).transpose(0, 1)

    key, value = gathered(keys), gathered(values)
    return scaled_dot_product_attention(query, key, value, attn_mask=rows.mask, scale=rule.scale)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    segment: Segment,
    rule: _Rule,
) -> torch.Tensor:
    """``query`` ``[kv_heads, 1, group, key_dim]``; returns ``[1, kv_heads, group, value_dim]``."""
    first = rule.first_key(segment.past)
    key, value = _seen(keys, values, segment, first)
    if rule.plain:
        return scaled_dot_product_attention(query, key, value, scale=rule.scale).transpose(0, 1)
    mask = None
    if rule.slopes is not None:
        mask = _mask(batch, rule, query, segment.past, 1, first, segment.length - first).view(*query.shape[:3], -1)
    sinks = None if rule.sinks is None else rule.sinks.view(*query.shape[:3], 1)
    return _attend(query, key, value, mask, rule, sinks).transpose(0, 1)


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    segment: Segment,
    rule: _Rule,
) -> torch.Tensor:
    """``query`` ``[T, kv_heads, 1, group, key_dim]``; returns ``[T, kv_heads, group, value_dim]``."""
    query = query.squeeze(2).permute(1, 2, 0, 3)
    group = query.shape[1]
    first = rule.first_key(segment.past)
    key, value = (seen.expand(-1, group, -1, -1) for seen in _seen(keys, values, segment, first))
    return _causal(query, key, value, batch, rule, segment.past, first).permute(2, 0, 1, 3)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: DenseBatch, rule: _Rule, chunk: int | None
) -> torch.Tensor:
    """Causal attention within each row of a batch that isn't cached; ``[1, N, heads, value_dim]``."""
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // kv_heads

    def by_row(states: torch.Tensor) -> torch.Tensor:  # [1, heads, rows * T, dim] -> [rows, heads, T, dim]
        return states[0].unflatten(1, (batch.rows, batch.columns)).transpose(0, 1)

    outputs = []
    for one_query, one_key, one_value in zip(by_row(query), by_row(key), by_row(value), strict=True):
        shared_key = one_key[:, None].expand(-1, group, -1, -1)
        shared_value = one_value[:, None].expand(-1, group, -1, -1)
        grouped = one_query.unflatten(0, (kv_heads, group))
        parts = [states.split(chunk or batch.columns, 2) for states in (grouped, shared_key, shared_value)]
        whole = torch.cat([_causal(q, k, v, batch, rule, 0, 0) for q, k, v in zip(*parts, strict=True)], 2)
        outputs.append(whole.flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs)[None]


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch | DenseBatch,
    rule: _Rule,
    first_query: int,
    first_key: int,
) -> torch.Tensor:
    """``query`` ``[kv_heads, group, T, key_dim]`` at ``first_query`` and on, over the keys from ``first_key`` on."""
    queries, length = query.shape[2], key.shape[2]
    narrow = rule.window is not None and first_query + queries - first_key > rule.window
    if rule.plain and not narrow and first_query == first_key:
        return scaled_dot_product_attention(query, key, value, is_causal=queries > 1, scale=rule.scale)
    rows = max(1, _LARGEST_SCORES // (length * (1 if rule.plain else query[..., 0, 0].numel())))
    if rows < queries:
        pieces = []
        for begin in range(0, queries, rows):
            end = min(begin + rows, queries)
            first = rule.first_key(first_query + begin)
            seen = slice(first - first_key, first_query + end - first_key)
            piece = query[:, :, begin:end], key[:, :, seen], value[:, :, seen]
            pieces.append(_causal(*piece, batch, rule, first_query + begin, first))
        return torch.cat(pieces, dim=2)
    mask = _mask(batch, rule, query, first_query, queries, first_key, length)
    if mask.dim() == 3:
        mask = mask.unflatten(0, query.shape[:2])
    sinks = None if rule.sinks is None else rule.sinks.view(*query.shape[:2], 1, 1)
    return _attend(query, key, value, mask, rule, sinks)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rule: _Rule,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if rule.fusable:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale)
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return scores.softmax(-1).to(value.dtype) @ value
    weights = torch.cat([scores, sinks.float().expand(*scores.shape[:3], 1)], dim=-1).softmax(-1)
    return weights[..., :-1].to(value.dtype) @ value


def _mask(
    batch: Batch | DenseBatch,
    rule: _Rule,
    query: torch.Tensor,
    first_query: int,
    queries: int,
    first_key: int,
    keys: int,
) -> torch.Tensor:
    # The first key follows from the first query and the window, so it needs no place in the name of a mask
    name = ("mask", first_query, queries, rule.window, None if rule.slopes is None else id(rule.slopes))
    if (found := batch.made.get(name)) is not None:
        mask: torch.Tensor = found[0]
        return mask
    made = build_mask(
        first_query=first_query,
        queries=queries,
        first_key=first_key,
        keys=keys,
        window=rule.window,
        slopes=rule.slopes,
        dtype=query.dtype,
        device=query.device,
    )
    if made.numel() <= _LARGEST_SCORES:
        batch.made[name] = made, rule.slopes
    return made


register_attention(NAME, attention)
