"""Attention over the pages of the KV cache, where a kernel can read them in place: one call a block for all rows.

The kernel is torch's ``varlen_attn`` with a block table (FlashAttention-2; Dao, 2023, on pages as in Kwon et al.,
"PagedAttention", 2023). Whoever calls it can be given another function with the same arguments, which is how all of
this is tested without a GPU.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..gpu.transfer import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PagedKernel:
    """A function that attends over pages, and what it asks for.

    Attributes:
        call: takes what :func:`torch.nn.attention.varlen.varlen_attn` takes. Queries are the last positions of their
            row; ``window_size`` ``(left, right)`` says how many keys before and behind it a query sees, -1: all.
        page_size: pages are of a multiple of this many tokens.
        dtypes: in which it computes.
        max_dim, dim_multiple: which sizes of heads it takes.
    """

    call: Callable[..., torch.Tensor]
    page_size: int
    dtypes: frozenset[torch.dtype]
    max_dim: int
    dim_multiple: int

    def suits(self, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
        """Whether it computes attention of this kind."""
        fits = key_dim == value_dim <= self.max_dim and not key_dim % self.dim_multiple
        return fits and dtype in self.dtypes


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


def torch_kernel() -> PagedKernel | None:
    """torch's own kernel for CUDA; None, with a line in the log, if this version has none that takes a block table."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        logger.warning("paged attention: torch %s has no varlen_attn; attention runs row by row", torch.__version__)
        return None
    if not {"seqused_k", "block_table", "num_splits", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        logger.warning(
            "paged attention: varlen_attn of torch %s takes no block table; attention runs row by row",
            torch.__version__,
        )
        return None
    logging.getLogger(varlen_attn.__module__).setLevel(logging.WARNING)  # it says on every call what it runs
    # What FlashAttention-2 checks before it runs: pages of a multiple of 256 tokens, heads of at most 256 in eights
    return PagedKernel(varlen_attn, 256, frozenset({torch.float16, torch.bfloat16}), 256, 8)  # type: ignore[arg-type]
