"""What an ``attention_mask`` means to blocks that only know "row ``i`` ignores its first ``n`` columns"."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING_HELP = (
    "pad on the left: in attention_mask each row is zeros and then ones "
    "(tokenizer.padding_side = 'left', and pass the tokenizer's attention_mask)"
)


def left_padding_for_cache(mask: Tensor | None, rows: int, columns: int) -> tuple[int, ...]:
    """How many columns each row ignores, for a pass that later tokens will continue.

    Args:
        mask: ``[rows, columns]`` of zeros and ones over all columns so far, or None for no padding.

    Raises:
        ValueError: a row has zeros after a one, or no ones at all, or the shape is another.
    """
    if mask is None:
        return (0,) * rows
    left, kept = _runs(mask, rows, columns)
    if any(start + length != columns for start, length in zip(left, kept, strict=True)):
        raise ValueError(f"tokens can only be added to rows that end in a token: {PADDING_HELP}")
    return left


def left_padding_for_pass(mask: Tensor | None, rows: int, columns: int) -> tuple[int, ...]:
    """How many columns each row ignores, for one pass without a cache: zeros at the end are harmless there.

    Raises:
        ValueError: a row has zeros between ones, or the shape is not ``[rows, columns]``.
    """
    return (0,) * rows if mask is None else _runs(mask, rows, columns)[0]


def _runs(mask: Tensor, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and length of each row's only run of ones."""
    if mask.ndim != 2 or tuple(mask.shape) != (rows, columns):
        raise ValueError(
            f"attention_mask has to have the shape {(rows, columns)}, a column for every token so far, "
            f"and not {tuple(mask.shape)}: blocks attend causally, and only padding can be masked"
        )
    ones = mask.to("cpu").bool()
    starts = ones.int().argmax(dim=1)
    lengths = ones.sum(dim=1)
    column = torch.arange(columns)
    run = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    if not torch.equal(run, ones):
        raise ValueError(f"attention_mask has holes: {PADDING_HELP}")
    return tuple(starts.tolist()), tuple(lengths.tolist())


def shift_rows(hidden: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Each row of ``[rows, columns, size]`` turned left by its offset: column ``offsets[i]`` becomes column 0.

    Under causal attention with relative positions a row that starts at column 0 and has junk behind it gives the
    same values as one that starts later. Negative offsets turn back. Differentiable.
    """
    if not any(offsets):
        return hidden
    columns = hidden.shape[1]
    shift = torch.tensor(offsets, device=hidden.device)[:, None]
    source = (torch.arange(columns, device=hidden.device) + shift) % columns
    return hidden.gather(1, source[:, :, None].expand_as(hidden))
