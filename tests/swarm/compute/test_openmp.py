"""Worker threads wait as we say, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from swarm.compute.openmp import set_waiting


@pytest.mark.parametrize("theirs", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_says_holds(theirs: dict[str, str]) -> None:
    environment = dict(theirs)
    set_waiting(environment)
    assert environment == theirs


def test_it_comes_before_torch() -> None:
    """The library reads it when it is loaded, and says what it read."""
    code = (
        "import sys; from swarm.compute.openmp import set_waiting; set_waiting(); "
        "assert 'torch' not in sys.modules; import torch"
    )
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**plain, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP library")
