"""The imports of a command, which owns its process, without two costs: looking for garbage, and ``scipy.optimize``.

hivemind averages gradients with ``scipy.optimize``, and transformers computes a loss; a command does neither. It is
imported when it is called. ``SWARM_LATE_IMPORTS=0`` imports everything as it is, as a program that imports us does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_LATE = "scipy.optimize"


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a command: what they make stays, so nothing looks through it for garbage, then or later."""
    if os.environ.get("SWARM_LATE_IMPORTS") == "0":
        yield
        return
    gc.disable()
    try:
        _import_without_scipy()
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_without_scipy() -> None:
    """Imports what would import ``scipy.optimize``, which is to be had for all others as it is."""
    if _LATE in sys.modules:
        return
    sys.modules[_LATE] = stand_in = ModuleType(_LATE)
    stand_in.linear_sum_assignment = _linear_sum_assignment  # type: ignore[attr-defined]
    try:
        import hivemind  # noqa: F401  # looks for linprog in scipy when it averages

        with contextlib.suppress(ImportError):  # another release may have it elsewhere, or need more of scipy
            import transformers.loss.loss_utils  # noqa: F401
    finally:
        del sys.modules[_LATE]


def _linear_sum_assignment(*args: Any, **options: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(*args, **options)
