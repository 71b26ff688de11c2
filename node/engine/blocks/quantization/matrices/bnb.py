"""bitsandbytes, an optional dependency."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from swarm.errors import UsageError


@functools.cache
def bitsandbytes() -> ModuleType:
    """The package.

    Raises:
        UsageError: it is not installed, or can't be loaded here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of what _plain() hides
    try:
        with _plain():
            import bitsandbytes
    except Exception as error:  # a missing shared library can raise anything
        raise UsageError(
            f"this quantization needs the package bitsandbytes ({error}): pip install 'swarm-llm[quantization]'"
        ) from error
    module: ModuleType = bitsandbytes
    return module


@functools.cache
def has_cpu_kernel() -> bool:
    """Whether it multiplies with four bits on this CPU without dequantizing the matrix first."""
    return bool(bitsandbytes().functional.has_avx512bf16())


@contextmanager
def _plain() -> Iterator[None]:
    """Without two things that it does when it is imported. Given the package ``kernels`` it fetches code for CPUs from
    the Hub; a node runs nothing that it wasn't installed with. And it decorates with ``torch.compile`` what a node
    never calls, for which torch loads its whole compiler: seconds, and 50 MB.
    """
    kernels, compiler = sys.modules.get("kernels"), torch.compile
    sys.modules["kernels"] = None  # type: ignore[assignment]
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
