"""One starter of Petals' servers and clients for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.petals.peers import Petals, closing, install


@pytest.fixture(scope="session")
def petals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Petals]:
    install()
    with closing(Petals(tmp_path_factory.mktemp("petals"))) as petals:
        yield petals
