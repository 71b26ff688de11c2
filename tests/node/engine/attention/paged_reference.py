"""What torch's ``varlen_attn`` with a block table computes, written out, and as picky as it is."""

from __future__ import annotations

import torch

from swarm.node.engine.cache.paged_kernel import PagedKernel


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """The signature of torch 2.13. ``query`` ``[N, heads, dim]``, ``key`` and ``value`` ``[pages, page_size, kv_heads,
    dim]``; a row's queries are aligned with the end of its keys."""
    assert cu_seq_k is not None
    assert seqused_k is not None
    assert block_table is not None
    rows = len(seqused_k)
    for tensor, shape in ((cu_seq_q, (rows + 1,)), (cu_seq_k, (rows + 1,)), (seqused_k, (rows,))):
        assert tensor.dtype == torch.int32
        assert tensor.shape == shape
        assert tensor.is_contiguous()
    assert block_table.dtype == torch.int32
    assert block_table.shape[0] == rows
    for pool in (key, value):
        assert pool.is_contiguous()
    assert query.stride(-1) == 1
    assert enable_gqa or query.shape[1] == key.shape[2]
    single = max_q == 1 and query.shape[1] > key.shape[2] and window_size == (-1, -1)
    assert single or num_splits == 1, "splits are put together right only for single grouped queries"
    assert max_k <= block_table.shape[1] * key.shape[1]
    outputs = []
    for row in range(rows):
        mine = query[cu_seq_q[row] : cu_seq_q[row + 1]].transpose(0, 1)
        length, queries = int(seqused_k[row]), mine.shape[1]
        assert 0 < queries <= max_q
        assert queries <= length <= max_k
        assert int(cu_seq_k[row + 1] - cu_seq_k[row]) == length
        pages = block_table[row, : -(-length // key.shape[1])].long()
        keys, values = (
            pool[pages].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[2], 0)
            for pool in (key, value)
        )
        distance = torch.arange(length) - torch.arange(length - queries, length)[:, None]
        left, right = window_size
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= (distance > right) if right >= 0 else hidden
        hidden |= (distance < -left) if left >= 0 else hidden
        scores = mine @ keys.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


KERNEL = PagedKernel(varlen_attn, 1, frozenset({torch.float32, torch.bfloat16}), 256, 1)
