"""Ends what the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.swarm_e2e.nodes import Zygote


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    yield
    Zygote.close()
