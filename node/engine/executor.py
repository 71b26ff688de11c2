"""Runs one batch through the blocks: with the cache, without it, and backward."""

from __future__ import annotations

import itertools

import torch

from swarm.model.span import Span

from .attention import attention as _registered  # noqa: F401  (registers the function)
from .attention.batch import Batch, DenseBatch, pack_dense
from .blocks.lora import using


class PlacedPrompts:
    """Deep prompts for one batch: ``values`` ``[blocks, n, H]`` are added to the tokens ``where`` before each block."""

    def __init__(self, prompts: torch.Tensor, where: list[int], rows: list[int], columns: list[int]) -> None:
        device = prompts.device
        self._where = torch.tensor(where, dtype=torch.int64, device=device)
        picked = torch.tensor(rows, dtype=torch.int64, device=device) if prompts.shape[1] > 1 else None
        column = torch.tensor(columns, dtype=torch.int64, device=device)
        self._values = prompts[:, 0, column] if picked is None else prompts[:, picked, column]

    def add(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` ``[1, N, H]`` with the prompts of the batch's ``block``-th block (from 0) added."""
        return hidden.index_add(1, self._where.to(hidden.device), self._values[block][None].to(hidden.device))


def run_blocks(
    span: Span,
    hidden: torch.Tensor,
    batch: Batch | DenseBatch,
    *,
    first: int,
    last: int,
    prompts: PlacedPrompts | None = None,
    prompts_from: int | None = None,
) -> torch.Tensor:
    """``hidden`` ``[1, N, H]`` (dtype of the span) through the blocks ``first:last``, on whatever devices they are.

    ``prompts`` belong to the blocks from ``prompts_from`` (or ``first``) on.
    """
    for device, begin, end in span.runs(first, last):
        hidden, batch = hidden.to(device, non_blocking=True), batch.to(device)
        prepared = span.prepare(hidden, batch.positions, start=batch.start)
        with using(batch.adapters):
            for block in range(begin, end):
                if prompts is not None:
                    hidden = prompts.add(block - (first if prompts_from is None else prompts_from), hidden)
                hidden = span.run(block, hidden, prepared, batch)
    return hidden


def place_dense(prompts: torch.Tensor, rows: int, columns: int) -> PlacedPrompts:
    """``prompts`` ``[blocks, rows or 1, P, H]`` for ``rows`` rows of ``columns`` tokens, packed flat."""
    length = min(columns, prompts.shape[2])
    cells = [(row, column) for row in range(rows) for column in range(length)]
    return PlacedPrompts(
        prompts, [row * columns + column for row, column in cells], [row for row, _ in cells], [c for _, c in cells]
    )


def forward(
    span: Span,
    hidden: torch.Tensor,
    *,
    first: int,
    last: int,
    prompts: torch.Tensor | None = None,
    adapter: str = "",
) -> torch.Tensor:
    """``hidden`` ``[rows, T, H]`` through the blocks ``first:last`` without a cache; same shape."""
    rows, columns, size = hidden.shape
    placed = None if prompts is None else place_dense(prompts, rows, columns)
    batch = pack_dense(rows, columns, hidden.device, adapter)
    flat = hidden.reshape(1, rows * columns, size)
    return run_blocks(span, flat, batch, first=first, last=last, prompts=placed).view(rows, columns, size)


def backward(
    span: Span,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    *,
    first: int,
    last: int,
    prompts: torch.Tensor | None = None,
    adapter: str = "",
    kept_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients with respect to ``hidden`` ``[rows, T, H]`` and ``prompts``, given ``grad`` of the output.

    Activations are kept for about ``kept_tokens`` tokens times blocks: where that isn't enough for all blocks, the
    blocks' inputs are kept for groups of them and the rest is computed once more.
    """
    rows, columns, size = hidden.shape
    batch = pack_dense(rows, columns, hidden.device, adapter)
    group = max(1, kept_tokens // (rows * columns))
    # within a group of blocks gradients also go through keys and values that they share
    starts = [start for start in range(first, last, group) if start not in span.inner_boundaries]
    with torch.enable_grad():
        leaf_prompts = None if prompts is None else prompts.detach().clone().requires_grad_()
    inputs = [hidden.reshape(1, rows * columns, size)]
    with torch.no_grad():
        placed = None if prompts is None else place_dense(prompts, rows, columns)
        for begin, end in itertools.pairwise(starts):
            part = run_blocks(span, inputs[-1], batch, first=begin, last=end, prompts=placed, prompts_from=first)
            inputs.append(part)
    flowing = grad.reshape(1, rows * columns, size)
    for begin, end, given in zip(reversed(starts), reversed([*starts[1:], last]), reversed(inputs), strict=True):
        with torch.enable_grad():
            leaf = given.detach().clone().requires_grad_()
            placed = None if leaf_prompts is None else place_dense(leaf_prompts, rows, columns)
            output = run_blocks(span, leaf, batch, first=begin, last=end, prompts=placed, prompts_from=first)
        output.backward(flowing.to(output.device))
        assert leaf.grad is not None
        flowing = leaf.grad
    return flowing.view(rows, columns, size), None if leaf_prompts is None else leaf_prompts.grad
