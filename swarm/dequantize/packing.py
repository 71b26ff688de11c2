"""Small numbers that are packed into larger words."""

from __future__ import annotations

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of ``bits`` bits from 32-bit words, the lowest bits first.

    Args:
        words: ``[..., N]`` int32. Where ``bits`` does not divide 32, numbers lie across the edges of words.

    Returns:
        ``[..., N * 32 // bits]`` int32.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
    stream = ((words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten(-2)
    stream = stream[..., : stream.shape[-1] // bits * bits].unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Two E2M1 floats (sign, two bits exponent, one bit mantissa) a byte, the lower four bits first.

    Args:
        packed: ``[..., N]`` uint8.

    Returns:
        ``[..., 2 * N]`` float32.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    packed = packed.view(torch.uint8)
    return table[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()]


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0 scales, a byte each: ``2 ** (byte - 127)`` as float32."""
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None = None) -> torch.Tensor:
    """A scale for each element (or one that broadcasts to that) from one for each block.

    Args:
        scale: one number; one a row ``[rows]``; or a grid ``[..., R, C]``.
        shape: of the weight, ``[..., rows, columns]``.
        block: rows and columns of a block, where the last ones may be smaller; by default the grid divides the weight.

    Raises:
        ValueError: the grid does not fit.
    """
    rows, columns = shape[-2:]
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and scale.shape[0] == rows:
        scale = scale[:, None]
    if scale.ndim != len(shape):
        raise ValueError(f"scales of shape {list(scale.shape)} don't fit a weight {list(shape)}")
    for dim, size, grid in ((-2, rows, scale.shape[-2]), (-1, columns, scale.shape[-1])):
        if grid == 1:
            continue
        length = block[dim] if block is not None and -(-size // block[dim]) == grid else size // grid
        if length * grid < size:
            raise ValueError(f"scales of shape {list(scale.shape)} don't fit a weight {list(shape)}")
        if length > 1:
            scale = scale.repeat_interleave(length, dim).narrow(dim, 0, size)
    return scale
