"""Matrix products whose rows don't depend on each other's number, to the last bit.

A kernel for one row adds up in another order than one for sixteen, so a row's last bits depend on how many rows it is
computed with. But the order follows from the shapes alone, not from the data, and for most numbers of rows it is the
same. So the numbers that agree with each other are found once for each shape, on random data, and from then on a
product is only ever taken over so many rows: cut, and padded where need be. A row by itself is always such a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import nn

Compute = Callable[[torch.Tensor], torch.Tensor]

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_WEIGHTS_COST = 8  # reading the weights once costs about what computing so many rows costs
_ALIGNMENT = 64  # bytes: kernels may begin differently where memory is less aligned than torch's own

_found: dict[Hashable, tuple[int, ...]] = {}
"""By what tells kernels apart. Finding them takes hundreds of products, too long for each layer of a shape, and the
kernels are the process's, so these are kept for the process."""


def tiled(compute: Compute, x: torch.Tensor, key: Hashable) -> torch.Tensor:
    """``compute`` (``[n, in]`` to ``[n, out]``, each row by itself) of ``x`` ``[…, in]``, so that a row's bits are the
    same whatever the other rows and their number.

    Args:
        key: the same for all ``compute`` that run the same kernel: whatever tells shapes, dtypes and devices apart.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(flat):
        return compute(flat).view(*x.shape[:-1], -1)
    if flat.data_ptr() % _ALIGNMENT:
        flat = flat.clone()
    sizes = _found.get(key)
    if sizes is None:
        sizes = _found[key] = agreeing_sizes(compute, flat)
    if len(flat) in sizes:
        output = compute(flat)
    else:
        parts, at = [], 0
        for size in split_rows(len(flat), sizes):
            part = flat[at : at + size]
            rows = len(part)
            if rows < size:
                part = nn.functional.pad(part, (0, 0, 0, size - rows))
            elif part.data_ptr() % _ALIGNMENT:
                part = part.clone()
            parts.append(compute(part)[:rows])
            at += rows
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.view(*x.shape[:-1], -1)


@torch.no_grad()
def agreeing_sizes(compute: Compute, like: torch.Tensor) -> tuple[int, ...]:
    """The largest set of numbers of rows for which ``compute`` gives a row the same bits, wherever it is among them
    and whatever the others are. ``like`` ``[n, in]`` tells width, dtype and device."""
    width = compute(like[:1]).shape[1]
    # Rounded to 16 bits, about one element in a thousand shows that it was added up in another order
    elements = 1 << (13 if like.dtype == torch.float32 else 17)
    largest = CANDIDATES[-1]
    count = min(max(elements // width, largest), 32 * largest) // largest * largest
    rows = torch.randn(count, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    groups: list[tuple[list[int], torch.Tensor]] = []
    for size in CANDIDATES:
        output = _in_tiles(compute, rows, size)
        if not _rows_stand_alone(compute, rows, output, size):
            continue
        for sizes, same in groups:
            if torch.equal(output, same):
                sizes.append(size)
                break
        else:
            groups.append(([size], output))
    return tuple(max(groups, key=lambda group: len(group[0]))[0])


def _in_tiles(compute: Compute, rows: torch.Tensor, size: int) -> torch.Tensor:
    short = -len(rows) % size
    padded = nn.functional.pad(rows, (0, 0, 0, short))
    return torch.cat([compute(tile.clone()) for tile in padded.split(size)])[: len(rows)]


def _rows_stand_alone(compute: Compute, rows: torch.Tensor, output: torch.Tensor, size: int) -> bool:
    """Whether each row keeps its bits one place further on, and next to others that are changed."""
    if size == 1:
        return True
    for changed in (0, 1):
        other = rows.roll(1, 0)
        other[changed::2] *= 3
        same = slice(1 - changed, None, 2)
        if not torch.equal(_in_tiles(compute, other, size)[same], output.roll(1, 0)[same]):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def split_rows(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest way to cover ``rows`` rows with tiles of ``sizes``; the last tile may reach beyond the end."""
    largest = max(sizes)
    if rows > 2 * largest:
        whole = rows // largest - 1
        return (largest,) * whole + split_rows(rows - whole * largest, sizes)
    best: tuple[int, ...] = (min((size for size in sizes if size >= rows), default=0),)
    for size in sizes:
        if size < rows:
            covered = (size, *split_rows(rows - size, sizes))
            if not best[0] or _cost(covered) < _cost(best):
                best = covered
    return best


def _cost(tiles: tuple[int, ...]) -> int:
    return sum(tiles) + _WEIGHTS_COST * len(tiles)


def tile_linear(module: nn.Module) -> None:
    """Makes a linear layer (``[…, in]`` to ``[…, out]``, of any kind) compute in tiles."""
    forward = module.forward
    weight = getattr(module, "weight", None)
    where = weight.data_ptr() % _ALIGNMENT if isinstance(weight, torch.Tensor) else 0
    shape = module.in_features, module.out_features, getattr(module, "bias", None) is not None

    def compute(rows: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():  # what is inside is not to be cut once more
            output: torch.Tensor = forward(rows)
        return output

    def tiled_forward(x: torch.Tensor) -> torch.Tensor:
        return tiled(compute, x, (type(module), *shape, where, x.dtype, x.device))

    module.forward = tiled_forward  # type: ignore[method-assign, assignment]
