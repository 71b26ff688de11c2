"""bitsandbytes, an optional dependency."""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType

from swarm.errors import UsageError


@functools.cache
def bitsandbytes() -> ModuleType:
    """The package.

    Raises:
        UsageError: it is not installed, or can't be loaded here.
    """
    # On a CPU it would fetch kernels from the Hub if it could; a node runs no code that it wasn't installed with.
    hidden = {"kernels": sys.modules.get("kernels")}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of just that
    try:
        import bitsandbytes
    except Exception as error:  # a missing shared library can raise anything
        raise UsageError(
            f"this quantization needs the package bitsandbytes ({error}): pip install 'swarm-llm[quantization]'"
        ) from error
    finally:
        if hidden["kernels"] is None:
            del sys.modules["kernels"]
        else:
            sys.modules |= hidden
    module: ModuleType = bitsandbytes
    return module


@functools.cache
def has_cpu_kernel() -> bool:
    """Whether it multiplies with four bits on this CPU without dequantizing the matrix first."""
    return bool(bitsandbytes().functional.has_avx512bf16())
