"""How torch's worker threads wait for work. To be set before torch is imported: the OpenMP library reads it then.

GNU's library lets idle threads spin, by default for long, on cores that a hop on the same machine or the network needs.
Sent to sleep at once, they must be woken for every operation, and a decode step has hundreds. So they spin for about as
long as the pauses within a step are: a quarter of a millisecond (docs/benchmarks.md).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def set_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have idle threads spin for a short time and sleep then, unless ``environment`` says something already."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="15000")
