"""A kernel that attends over the pages of the KV cache in place, and what it asks of the cache.

It is torch's ``varlen_attn`` with a block table (FlashAttention-2; Dao, 2023, on pages as in Kwon et al.,
"PagedAttention", 2023). An engine can be given another function with the same arguments, which is how all of this is
tested without a GPU.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
