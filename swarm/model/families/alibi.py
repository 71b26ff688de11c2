"""ALiBi: a bias on attention logits that falls with distance, at a slope of its own for each head."""

from __future__ import annotations

import math

import torch


def alibi_slopes(heads: int) -> torch.Tensor:
    """The slopes, ``[heads]`` float32: powers of ``2 ** (-8 / heads)``.

    Heads beyond a power of two take the odd powers of the series for twice as many.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = _powers(whole, range(1, whole + 1))
    if whole < heads:
        slopes += _powers(2 * whole, range(1, 2 * (heads - whole), 2))
    return torch.tensor(slopes, dtype=torch.float32)


def _powers(heads: int, exponents: range) -> list[float]:
    return [2 ** (-8 / heads * exponent) for exponent in exponents]
