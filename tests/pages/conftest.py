"""A browser before a real gateway before real nodes. Nothing that the pages write to the console is let pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from swarm.client.gateway.server import GatewaySettings, running
from tests.pages.browser import chromium
from tests.swarm_e2e.nodes import Swarm, run_swarm

expect.set_options(timeout=20_000)
AXE = Path(__file__).with_name("vendor") / "axe.min.js"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SWARM_SKIP_BROWSER"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="SWARM_SKIP_BROWSER is set"))


@dataclass
class Site:
    """A gateway's pages, and the swarm behind them."""

    url: str
    swarm: Swarm
    settings: GatewaySettings


@pytest.fixture(scope="session")
def swarm() -> Iterator[Swarm]:
    with run_swarm("demo", ("0:4", "4:8", "4:8"), "--cache-tokens", "8192") as swarm:
        yield swarm


@pytest.fixture(scope="session")
def site(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    settings = GatewaySettings(
        models=("demo",),
        initial_peers=tuple(swarm.initial_peers),
        host="127.0.0.1",
        port=0,
        keys_file=tmp_path_factory.mktemp("gateway") / "keys.sqlite",
        max_sessions=8,
        max_queue=8,
    )
    with running(settings, lambda _: None) as gateway:
        yield Site(gateway.url.removesuffix("v1"), swarm, settings)


@pytest.fixture(scope="package")  # not longer: its event loop would be in the way of other tests
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def console() -> list[str]:
    """What the page throws, or writes to the console as an error or warning. What is left there fails the test."""
    return []


@pytest.fixture
def page(browser: Browser, console: list[str]) -> Iterator[Page]:
    """A page of a new visitor."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: console.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    yield page
    context.close()
    assert not console


def ask_for(page: Page, **fields: Any) -> None:
    """Has the page's requests for replies carry these fields too; they go on to the real gateway."""

    def change(route: Route) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data or "{}"), **fields}))

    page.route("**/v1/chat/completions", change)


def axe_findings(page: Page) -> list[str]:
    """What axe-core finds serious or critical. It is run beside the page's scripts, whose policy keeps others out."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("() => axe.run(document)")["violations"]
    return [
        f"{each['id']}: {each['help']} ({node['html'][:150]})"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
