"""Makes docs/screenshots/*.png: each page of the gateway, before a private swarm of the built-in model.

    .venv/bin/python scripts/screenshots.py

Needs chromium (scripts/setup_browser.sh).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, Route, expect

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from swarm.client.commands.local_swarm import LocalSwarm  # noqa: E402
from swarm.client.gateway.server import GatewaySettings, running  # noqa: E402
from tests.pages.browser import chromium  # noqa: E402

SPANS = ("0:3", "3:6", "5:8", "0:4", "4:8", "2:6")
NAMES = ("attic", "cellar", "kitchen", "lab-1", "lab-2", "library")
TO = ROOT / "docs" / "screenshots"
MAX_BYTES = 200_000
HISTORY_SECONDS = 45


def main() -> None:
    """Starts the swarm, a gateway and a browser, and uses the pages."""
    TO.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="swarm-screenshots-") as work, LocalSwarm("demo", Path(work)) as swarm:
        swarm.wait([swarm.start(SPANS[0], name=NAMES[0])])
        swarm.wait([swarm.start(span, name=name) for span, name in zip(SPANS[1:], NAMES[1:], strict=True)])
        settings = GatewaySettings(
            models=("demo",),
            initial_peers=tuple(swarm.peers),
            host="127.0.0.1",
            port=0,
            keys_file=Path(work) / "keys.sqlite",
            max_sessions=8,
            max_queue=8,
        )
        with running(settings, lambda _: None) as gateway, chromium() as browser:
            use(browser, gateway.url.removesuffix("v1"), swarm)
    for file in sorted(TO.glob("*.png")):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")
        if file.stat().st_size > MAX_BYTES:
            raise SystemExit(f"{file.name} is too large for the README")


def use(browser: Browser, url: str, swarm: LocalSwarm) -> None:
    """Takes the pictures."""
    page = browser.new_page(viewport={"width": 1100, "height": 720})
    page.goto(url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("400")
    page.get_by_role("button", name="Done").click()
    end = time.monotonic() + HISTORY_SECONDS
    say(page, "How do I read a file line by line?")
    while time.monotonic() < end:
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=60_000)
    busy = next(name for name in NAMES if name in page.locator(".note").inner_text())
    page.get_by_role("button", name="Token times").click()
    page.locator(".token").nth(9).click()
    shoot(page, "token")
    page.keyboard.press("Escape")

    page.route("**/v1/chat/completions", without_end)
    page.get_by_role("button", name="Regenerate").click()
    other = browser.new_page(viewport={"width": 1100, "height": 760})
    other.goto(url + "swarm.html")
    expect(other.locator("svg.map rect.bar")).to_have_count(len(SPANS))
    other.wait_for_timeout(2500)
    shoot(other, "swarm")
    other.get_by_role("link", name=busy).click()
    expect(other.locator("figure polyline").first).to_be_attached()
    other.wait_for_timeout(6000)
    shoot(other, "node")
    page.keyboard.press("Escape")
    page.unroute("**/v1/chat/completions")

    page.get_by_role("button", name="New chat").click()
    say(page, "What does enumerate do?")
    last = page.locator(".hop").last
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    name = last.inner_text().split()[-1]
    swarm.nodes[NAMES.index(name)].process.kill()
    expect(page.locator(".detour")).to_contain_text("went on at")
    shoot(page, "chat")
    phone = browser.new_page(viewport={"width": 390, "height": 720}, color_scheme="dark")
    phone.goto(url)
    say(phone, "How do I read a file line by line?")
    expect(phone.locator(".speed")).to_contain_text("tokens/s")
    phone.wait_for_timeout(500)
    shoot(phone, "phone")


def without_end(route: Route) -> None:
    """Has a reply be as long as there is room for, so that there is something to see."""
    body = json.loads(route.request.post_data or "{}")
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True, "max_tokens": 1500}))


def say(page: Page, text: str) -> None:
    """Sends a message."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def shoot(page: Page, name: str) -> None:
    """Writes a picture of what is on the screen."""
    page.screenshot(path=TO / f"{name}.png")


if __name__ == "__main__":
    main()
