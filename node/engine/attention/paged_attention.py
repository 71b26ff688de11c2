"""Attention over the pages of the KV cache, where a kernel can read them in place: one call a block for all rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from swarm.compute.transfer import to_device

from ..cache.paged_kernel import PagedKernel


@dataclass(frozen=True, eq=False)
class PagedRows:
    """What the kernel needs to know about the rows of a batch; the same for all blocks.

    Attributes:
        query_ends: ``[rows + 1]`` int32, where each row's queries end in the batch, after a 0.
        key_ends: ``[rows + 1]`` int32, the same for its keys, as if they lay one row behind the other.
        lengths: ``[rows]`` int32, keys of each row.
        table: ``[rows, pages]`` int32, each row's pages in order; what is behind its last page is not looked at.
        most_queries: of one row.
        most_keys: at least those of the longest row.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    most_queries: int
    most_keys: int

    def to(self, device: torch.device) -> PagedRows:
        """The same on ``device``."""
        names = ("query_ends", "key_ends", "lengths", "table")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def describe_rows(
    queries: Sequence[int], lengths: Sequence[int], pages: Sequence[Sequence[int]], device: torch.device
) -> PagedRows:
    """Rows with ``queries`` new tokens each and ``lengths`` keys, in ``pages``, for the kernel."""
    width = max(len(row) for row in pages)
    sizes = (len(queries) + 1, len(lengths) + 1, len(lengths), len(pages) * width)
    ints = [0, *itertools.accumulate(queries), 0, *itertools.accumulate(lengths), *lengths]
    for row in pages:
        ints += row
        ints += [0] * (width - len(row))
    # one small copy to the device, not four
    parts = to_device(torch.tensor(ints), device, torch.int32).split(sizes)
    return PagedRows(parts[0], parts[1], parts[2], parts[3].view(-1, width), max(queries), max(lengths))


def paged_attention(
    kernel: PagedKernel,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    *,
    page_size: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of ``query`` ``[N, heads, dim]``, the last positions of ``rows``, over the pools ``keys`` and
    ``values`` (``[kv_heads, 1, slots, dim]``, token-major in memory); returns ``[N, heads, dim]``.

    A query sees ``window`` positions, its own among them; all that are not later than itself if None.
    """
    grouped = query.shape[1] != keys.shape[0]
    window_size = (-1, 0)
    if window is not None and window < rows.most_keys:
        window_size = (window - 1, 0)
    elif rows.most_queries == 1:
        window_size = (-1, -1)  # one query, the last, sees all keys; said like this, groups of heads share reading them
    # Splits of long rows are put together right only in the form that FlashAttention makes of single grouped queries
    # (its issue 1217); that is where they are needed: a few queries over many keys.
    splits = None if grouped and window_size == (-1, -1) else 1
    return kernel.call(
        query,
        in_pages(keys, page_size),
        in_pages(values, page_size),
        rows.query_ends,
        rows.key_ends,
        rows.most_queries,
        rows.most_keys,
        scale=scale,
        window_size=window_size,
        enable_gqa=grouped,
        seqused_k=rows.lengths,
        block_table=rows.table,
        num_splits=splits,
    )


def in_pages(pool: torch.Tensor, page_size: int) -> torch.Tensor:
    """A token-major ``pool`` ``[kv_heads, 1, slots, dim]`` as ``[pages, page_size, kv_heads, dim]``: a view."""
    return pool[:, 0].transpose(0, 1).unflatten(0, (-1, page_size))
