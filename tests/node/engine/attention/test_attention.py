"""Paged attention equals attention written out, for every rule that models have."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swarm.model.probe import KVGeometry
from swarm.node.engine.attention import attention as attention_module
from swarm.node.engine.attention.attention import attention
from swarm.node.engine.attention.batch import pack, pack_dense
from swarm.node.engine.cache.kv_cache import KVCache, Row
from swarm.node.engine.cache.paged_kernel import PagedKernel
from tests.node.engine.attention.paged_reference import KERNEL

DIM = 8
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scaling": 0.7},
    "window": {"sliding_window": 3},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 2.0},
    "sinks": {"s_aux": True, "sliding_window": 4},
    "much": {"alibi": True, "softcap": 1.5, "sliding_window": 5, "scaling": 0.3},
}


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float = 1 / math.sqrt(DIM),
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """``query`` ``[heads, T, d]`` are the last positions of ``key`` ``[kv_heads, L, d]``; returns ``[T, heads, d]``."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    past = key.shape[1] - query.shape[1]
    logits = query @ key.transpose(1, 2) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(key.shape[1])
    at = past + torch.arange(query.shape[1])[:, None]
    if alibi is not None:
        logits = logits + alibi[:, None, None] * position
    hidden = position > at
    if sliding_window:
        hidden |= at - position >= sliding_window
    logits = logits.masked_fill(hidden, -math.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[:, None, None].expand(-1, logits.shape[1], 1)], dim=-1)
    weights = logits.softmax(-1)
    return (weights[..., : key.shape[1]] @ value).transpose(0, 1)


def with_tensors(rule: dict[str, Any], heads: int) -> dict[str, Any]:
    tensors = {"alibi": torch.linspace(0.05, 0.9, heads), "s_aux": torch.linspace(-1, 1, heads)}
    return {name: tensors[name] if value is True else value for name, value in rule.items()}


@pytest.mark.parametrize("kernel", [None, KERNEL], ids=["by-row", "paged"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 7)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    in_pieces=st.booleans(),
    fragmented=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_of_a_batch_see_their_own_past_only(
    rule: str,
    kernel: PagedKernel | None,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    in_pieces: bool,
    fragmented: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    query_heads, kv_heads = heads
    cpu = torch.device("cpu")
    cache = KVCache(
        start=3,
        tokens=400,
        page_size=2,
        kv=[KVGeometry(kv_heads, DIM, DIM)],
        dtype=torch.float32,
        device=cpu,
        kernel=kernel,
    )
    for pool in (cache.keys[3], cache.values[3]):
        pool.fill_(torch.nan)  # what isn't written must not be read
    if fragmented:
        cache.pages.release(cache.pages.take(200)[::2])
    options = with_tensors(RULES[rule], query_heads)
    module = SimpleNamespace(layer_idx=3)
    rows = [Row() for _ in lengths]
    keys = [torch.empty(kv_heads, 0, DIM) for _ in lengths]
    values = [torch.empty(kv_heads, 0, DIM) for _ in lengths]
    limit = attention_module._LARGEST_SCORES
    if in_pieces:
        attention_module._LARGEST_SCORES = 24
    try:
        for step in (0, 1):
            counts = [both[step] for both in lengths]
            total = sum(counts)
            if not total:
                continue
            keep = [row.length for row in rows]
            rows = cache.arrange(rows, sources=None, keep=keep, grow=counts, blocks=range(3, 4))
            batch = pack(cache, list(zip(rows, counts, strict=True)), cpu)
            query = torch.randn(1, query_heads, total, DIM)
            key, value = torch.randn(2, 1, kv_heads, total, DIM)
            output, _ = attention(module, query, key, value, None, batch=batch, **options)  # type: ignore[arg-type]
            offset = 0
            for at, count in enumerate(counts):
                mine = slice(offset, offset + count)
                offset += count
                keys[at] = torch.cat([keys[at], key[0, :, mine]], dim=1)
                values[at] = torch.cat([values[at], value[0, :, mine]], dim=1)
                rows[at].length += count
                if count:
                    expected = naive(query[0, :, mine], keys[at], values[at], **options)
                    torch.testing.assert_close(output[0, mine], expected, atol=2e-6, rtol=1e-5)
    finally:
        attention_module._LARGEST_SCORES = limit


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_without_a_cache_it_is_the_same_and_differentiable(
    rule: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if in_pieces:
        monkeypatch.setattr(attention_module, "_LARGEST_SCORES", 40)
    rows, columns, heads, kv_heads = 3, 7, 4, 2
    options = with_tensors(RULES[rule], heads)
    query = torch.randn(1, heads, rows * columns, DIM, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, rows * columns, DIM, requires_grad=True) for _ in range(2))
    batch = pack_dense(rows, columns, torch.device("cpu"))
    output, _ = attention(nn.Identity(), query, key, value, None, batch=batch, **options)
    expected = torch.cat(
        [
            naive(query[0, :, at], key[0, :, at], value[0, :, at], **options)
            for at in (slice(row * columns, (row + 1) * columns) for row in range(rows))
        ]
    )[None]
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(output)
    mine = torch.autograd.grad((output * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
