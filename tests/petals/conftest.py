"""One Petals client and one starter of Petals' servers for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.petals.peers import Client, Servers, closing, install
from tests.swarm_e2e.nodes import Zygote


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    install()
    return tmp_path_factory.mktemp("petals")


@pytest.fixture(scope="session")
def petals(workdir: Path) -> Iterator[Client]:
    with closing(Client(workdir / "client.log")) as client:
        yield client


@pytest.fixture(scope="session")
def servers(workdir: Path) -> Iterator[Servers]:
    with closing(Servers(workdir)) as servers:
        yield servers


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    yield
    Zygote.close()
