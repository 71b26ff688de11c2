"""Small numbers that are packed into larger words."""

from __future__ import annotations

from collections.abc import Callable

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of ``bits`` bits from 32-bit words, the lowest bits first.

    Args:
        words: ``[..., N]`` int32. Where ``bits`` does not divide 32, numbers lie across the edges of words.

    Returns:
        ``[..., N * 32 // bits]``, uint8 for 4 and 8 bits, else int32.
    """
    if bits in (4, 8):  # a byte at a time, for a matrix in int32 would be eight times as large as what is stored
        octets = words.contiguous().view(torch.uint8)
        if bits == 8:
            return octets
        numbers = torch.empty(*octets.shape, 2, dtype=torch.uint8, device=words.device)
        torch.bitwise_and(octets, 15, out=numbers[..., 0])
        torch.bitwise_right_shift(octets, 4, out=numbers[..., 1])
        return numbers.flatten(-2)
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
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    packed = packed.view(torch.uint8)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)  # of a byte: half as many are looked up
    return pairs.index_select(0, packed.flatten().int()).view(*packed.shape[:-1], -1)


def fp8_to_float(numbers: torch.Tensor) -> torch.Tensor:
    """FP8 as float32, by a table: torch's own conversion takes several times as long on a CPU."""
    if numbers.device.type != "cpu":
        return numbers.float()
    table = torch.arange(256, dtype=torch.uint8).view(numbers.dtype).float()
    return table.index_select(0, numbers.contiguous().view(torch.uint8).flatten().int()).view(numbers.shape)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0 scales, a byte each: ``2 ** (byte - 127)`` as float32."""
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def by_blocks(
    operation: Callable[[torch.Tensor, torch.Tensor], object],
    numbers: torch.Tensor,
    grid: torch.Tensor,
    *,
    block: tuple[int, int] | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies to all ``numbers``, in place, what belongs to their block: scales, or zeros.

    It is done some rows at a time: a scale for each number would take as much memory as the numbers.

    Args:
        operation: such as ``torch.Tensor.mul_``.
        numbers: ``[..., rows, columns]`` float32.
        grid: one number; one a row ``[rows]``; or one a block ``[..., R, C]``.
        block: rows and columns of a block, where the last ones may be smaller; by default the grid divides the numbers.
        columns: ``[columns]``, for each column its column in the grid, if blocks' columns don't lie side by side.

    Returns:
        ``numbers``.

    Raises:
        ValueError: the grid does not fit.
    """
    rows, width = numbers.shape[-2:]
    if grid.numel() == 1:
        operation(numbers, grid.reshape(()))
        return numbers
    if grid.ndim == 1 and len(grid) == rows:
        grid = grid[:, None]
    misfit = ValueError(f"scales of shape {list(grid.shape)} don't fit a weight {list(numbers.shape)}")
    if grid.ndim != numbers.ndim:
        raise misfit
    lengths = []
    for dim, size in ((-2, rows), (-1, width)):
        count = grid.shape[dim]
        length = block[dim] if block is not None and -(-size // block[dim]) == count else max(1, size // count)
        if count > 1 and (length * count < size or (length * (count - 1) >= size)):
            raise misfit
        lengths.append(size if count == 1 else length)
    regular = columns is None and width == grid.shape[-1] * lengths[1]
    if columns is None:
        columns = torch.arange(width, device=grid.device) // lengths[1]
    for start in range(0, rows, 1024):
        stop = min(start + 1024, rows)
        part = grid[..., torch.arange(start, stop, device=grid.device) // lengths[0], :]
        if regular:
            operation(numbers[..., start:stop, :].unflatten(-1, (-1, lengths[1])), part[..., None])
        else:
            operation(numbers[..., start:stop, :], part[..., columns])
    return numbers
