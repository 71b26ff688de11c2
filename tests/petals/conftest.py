"""One starter of Petals' servers and clients for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.petals.peers import Petals, closing, install
from tests.swarm_e2e.nodes import Zygote


@pytest.fixture(scope="session")
def petals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Petals]:
    install()
    with closing(Petals(tmp_path_factory.mktemp("petals"))) as petals:
        yield petals


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    yield
    Zygote.close()
