"""Memory: giving what is free back to the system, and telling that there is none."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

_NONE_LEFT = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something failed as there was no memory for it, on whatever device."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _NONE_LEFT):
        return True
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def trim() -> None:
    """Return what the C library keeps of freed memory. Without it, what loading needed for a moment stays with the
    process, scattered over the arenas of the loader's threads. Does nothing where there is no glibc."""
    if (function := _malloc_trim()) is not None:
        function(0)


def discard(tensor: torch.Tensor) -> None:
    """Give the memory behind a contiguous CPU tensor back at once, though it belongs to a larger one that lives on.
    Its values are undefined from now on. Does nothing where that can't be done."""
    page = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if (function := _madvise()) is not None and first < end:
        function(first, end - first, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl
        return None
