"""Random weights with which a model's output hangs on all of its parts, and on its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_PART = 1 << 26  # numbers that are made at a time


def random_weight(name: str, like: torch.Tensor, std: float, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The values of a tensor of a checkpoint, flat, in parts, in the dtype of ``like``, whose shape they are for.

    Norm weights are around one and biases around zero, none of them exactly: a part that is left out must show. What
    follows should hang on the token, not on what all positions share, or greedy text would be one token over and over:
    loud embeddings, small biases.

    Args:
        std: of matrices.
    """
    scale, mean = std if like.dim() > 1 else std / 5, 0
    if like.dim() == 1 and name.endswith(("weight", "scale", "scalar")):
        scale, mean = 0.1, 4 if "embed" in name else 1
    elif "embed" in name:
        scale = 10 * std
    for at in range(0, like.numel(), _PART):
        values = torch.empty(min(_PART, like.numel() - at), dtype=like.dtype).normal_(generator=generator)
        yield values.mul_(scale).add_(mean)
