"""What all tests have in common."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.swarm_e2e.nodes import Zygote

# No deadlines: how long an example takes says more of the machine than of the code. In CI the examples are the same
# every time, so that what fails there fails again.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")

# A shell starts what runs in the background with interrupts ignored, and its children with it, which should hear Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors are tiny here: threads that wait for each other cost more than they do, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    yield
    Zygote.close()
