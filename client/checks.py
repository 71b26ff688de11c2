"""What is wrong with tensors before they are sent: the caller's faults, found without a node. All raise InputError."""

from __future__ import annotations

import torch

from swarm.errors import InputError
from swarm.wire.codec import DTYPES, all_finite, dtype_name


def check_hidden(
    hidden: torch.Tensor, hidden_size: int, *, rows: int = 0, what: str = "hidden states", empty: bool = False
) -> None:
    """``hidden`` is ``[rows, T, hidden_size]``, of a floating dtype and finite; ``rows`` 0: any number of them.

    With a few tokens, as decode has them, this takes some microseconds.
    """
    shape = tuple(hidden.shape)
    if hidden.ndim != 3 or shape[2] != hidden_size or not hidden.is_floating_point():
        raise InputError(
            f"{what} are [rows, tokens, {hidden_size}] of a floating dtype; got {shape} of {dtype_name(hidden.dtype)}"
        )
    if rows and shape[0] != rows:
        raise InputError(f"the session has {rows} rows; {what} have {shape[0]}")
    if not hidden.numel() and not empty:
        raise InputError(f"{what} have no tokens: their shape is {shape}")
    if not all_finite(hidden):
        raise InputError(f"{what} are not finite: they have infinities or NaNs, or numbers that are almost as large")


def check_hypo_ids(hypo_ids: torch.Tensor | None, rows: int) -> None:
    """``hypo_ids`` are ``[rows]`` int64, each the number of a row; None is fine."""
    if hypo_ids is None:
        return
    if hypo_ids.dtype != torch.int64 or tuple(hypo_ids.shape) != (rows,):
        raise InputError(f"hypo_ids are [{rows}] int64; got {tuple(hypo_ids.shape)} of {dtype_name(hypo_ids.dtype)}")
    if int(hypo_ids.min()) < 0 or int(hypo_ids.max()) >= rows:
        raise InputError(f"hypo_ids are numbers of rows, from 0 to {rows - 1}")


def sendable(tensor: torch.Tensor) -> torch.Tensor:
    """A floating tensor in a dtype that can be sent, which float64 is not."""
    return tensor if tensor.dtype in DTYPES.values() or not tensor.is_floating_point() else tensor.float()
