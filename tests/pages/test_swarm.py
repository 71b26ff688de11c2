"""The swarm page: the map, a node, and the command to join."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from swarm.network.overview import Meter, NodeView, Overview, Rates
from tests.pages.conftest import Site, axe_findings


def large(nodes: int, blocks: int) -> Overview:
    """A swarm that nobody has at hand."""
    draw = random.Random(0)
    views = []
    for number in range(nodes):
        start = draw.randrange(blocks - 14)
        meter = Meter(1.0, draw.random() / 10, number % 7, 0, 0, 0, 1.0, 16384, draw.randrange(16384))
        rate = Rates(100 * draw.random(), 0.0, draw.random())
        views.append(
            NodeView(
                f"12D3KooW{number:044}",
                f"node-{number}",
                "online" if number % 50 else "joining",
                start,
                start + draw.randrange(2, 12),
                10 + 300 * draw.random(),
                None,
                16384,
                number % 7,
                "bfloat16",
                "nf4" if number % 3 else None,
                "swarm 0.1.0",
                False,
                1.7e9,
                meter=meter,
                rates=rate,
            )
        )
    return Overview("large", "large", blocks, tuple(views), ((blocks - 4, blocks),))


def serve(page: Page, overview: Overview, **more: Any) -> None:
    """Shows the page this one, once."""
    look = {
        "models": [overview.to_dict()],
        "join": {overview.model: ["org/large", "/ip4/192.168.1.5/tcp/1/p2p/Qm"]},
        **more,
    }
    events = f"data: {json.dumps(look)}\n\n"
    page.route("**/api/swarm/events", lambda route: route.fulfill(body=events, content_type="text/event-stream"))


def test_the_map_is_live(page: Page, site: Site) -> None:
    known = httpx.get(site.url + "api/swarm", timeout=30).json()["models"][0]["nodes"]  # a killed one for a while too
    page.goto(site.url + "swarm.html")
    expect(page.locator("svg.map rect.bar")).to_have_count(len(known))
    expect(page.locator("#summary")).to_contain_text("Every block is served")
    expect(page.locator("#live")).to_have_text("live")
    alive = sum(node.alive for node in site.swarm.nodes)
    another = site.swarm.add("2:6", "--name", "late <b>one</b>")
    expect(page.locator("svg.map rect.bar")).to_have_count(len(known) + 1)
    expect(page.locator("#nodes tbody tr").filter(has_text="late <b>one</b>")).to_contain_text("2:6")
    another.terminate()
    expect(page.locator("svg.map rect.bar:not(.away)")).to_have_count(alive)
    assert page.locator("#join").inner_text() == f"swarm-node serve demo --initial-peers {site.swarm.initial_peers[0]}"
    expect(page.locator("#join-note")).to_contain_text("own machine only")


@pytest.mark.parametrize(
    ("invitation", "command"),
    [
        ("swarm:/ip4/192.168.1.5/tcp/1/p2p/Qm#swk1_x", "--join 'swarm:/ip4/192.168.1.5/tcp/1/p2p/Qm#swk1_x'"),
        (None, "--initial-peers /ip4/192.168.1.5/tcp/1/p2p/Qm --swarm-key swarm.key"),
    ],
)
def test_how_to_join_a_locked_swarm(page: Page, site: Site, invitation: str | None, command: str) -> None:
    serve(page, large(3, 20), invitation=invitation)
    page.goto(site.url + "swarm.html")
    expect(page.locator("#join")).to_have_text(f"swarm-node serve org/large {command}")


def test_a_nodes_page(page: Page, site: Site) -> None:
    peer = site.swarm.nodes[0].peer_id
    points = [[1.7e9 + 5 * n, n, 0.0, 0.5, 1, 0, 0.25, 2.0] for n in range(120)]
    columns = ["time", "decode", "prefill", "busy", "sessions", "waiting", "cache_used", "rtt_ms"]
    page.goto(site.url + "swarm.html")
    page.locator("#nodes a").first.click()
    expect(page.locator("dl.facts")).to_contain_text(peer)
    expect(page.locator("dl.facts")).to_contain_text("0:4")
    expect(page.locator("figure")).to_have_count(7)
    assert axe_findings(page) == []
    page.route("**/api/swarm/nodes/*", lambda route: route.fulfill(json={"columns": columns, "points": points}))
    page.reload()
    line = page.locator("figure polyline").first
    expect(page.locator("figure").first).to_contain_text("119.0")
    assert len((line.get_attribute("points") or "").split()) == 120
    page.get_by_role("link", name="All nodes").click()
    expect(page.locator("svg.map rect.bar").first).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_swarm_with_holes_is_accessible(page: Page, site: Site, theme: Any) -> None:
    page.emulate_media(color_scheme=theme)
    serve(page, large(30, 40))
    page.goto(site.url + "swarm.html")
    expect(page.locator("svg.map rect.bar")).to_have_count(30)
    assert axe_findings(page) == []


def test_five_hundred_nodes(page: Page, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    serve(page, large(500, 80))
    page.goto(site.url + "swarm.html")
    bars = page.locator("svg.map rect.bar")
    expect(bars).to_have_count(500)
    expect(page.locator("#nodes tbody tr")).to_have_count(500)
    places = bars.evaluate_all("bars => bars.map(bar => ['x', 'y', 'width'].map(name => +bar.getAttribute(name)))")
    lanes: dict[float, list[tuple[float, float]]] = {}
    for x, y, width in places:
        lanes.setdefault(y, []).append((x, x + width))
    for lane in lanes.values():
        lane.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(lane))
    expect(page.locator("svg.map rect.hole")).to_have_count(1)
    expect(page.locator("#summary")).to_contain_text("Nobody serves blocks 76:80")
    expect(page.locator("#join")).to_have_text(
        "swarm-node serve org/large --initial-peers /ip4/192.168.1.5/tcp/1/p2p/Qm"
    )
    draws = page.evaluate("performance.getEntriesByName('swarm.draw').map(entry => entry.duration)")
    with capsys.disabled():
        print(f"\n500 nodes drawn in {draws[0]:.0f} ms of script")


def test_accessible(page: Page, site: Site) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(site.url + "swarm.html")
    expect(page.locator("#summary")).to_contain_text("served")
    assert axe_findings(page) == []
    page.get_by_role("button", name="theme").click()
    assert axe_findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
