"""The chat page as its users use it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from swarm.client.gateway.access.keys import KeyStore
from swarm.client.gateway.server import running
from tests.pages.conftest import Site, ask_for, axe_findings

QUESTION = "What is a list?"
ATTACKS = """
<script>window.hit = 1</script>

<img src=x onerror="window.hit = 2"> <svg onload="window.hit = 3"></svg>
<iframe srcdoc="<script>parent.hit = 4</script>"></iframe>

[a link](javascript:window.hit=5) ![an image](https://evil.example/x.png)
<a href="data:text/html,x" onclick="window.hit=6">b</a>

```html" onmouseover="window.hit=7
<b>code</b>
```

<style>body { display: none }</style><form action="https://evil.example"><button id="send">Send</button></form>
"""


def replies(page: Page) -> Any:
    return page.locator(".message.assistant")


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def kept(page: Page) -> list[dict[str, Any]]:
    """The messages of the newest conversation, as the browser keeps them."""
    chats: list[dict[str, Any]] = json.loads(page.evaluate("localStorage.getItem('swarm.chats')"))
    messages: list[dict[str, Any]] = chats[0]["messages"]
    return messages


def complete(site: Site, content: str, **fields: Any) -> str:
    """The reply that the API gives."""
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], **fields}
    answer = httpx.post(site.url + "v1/chat/completions", json=body, timeout=60).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_a_conversation(page: Page, site: Site) -> None:
    ask_for(page, temperature=0, max_tokens=30)
    page.goto(site.url)
    expect(page.get_by_label("Model")).to_have_value("demo")
    page.get_by_label("Message", exact=True).fill("one")
    page.keyboard.press("Shift+Enter")
    expect(page.get_by_label("Message", exact=True)).to_have_value("one\n")
    say(page, QUESTION)
    expect(page.get_by_role("button", name="Token times")).to_be_visible()
    right = complete(site, QUESTION, temperature=0, max_tokens=30)
    assert [(each["role"], each["content"]) for each in kept(page)] == [("user", QUESTION), ("assistant", right)]
    expect(page.locator(".note")).to_contain_text("30 tokens · 0:4")

    page.get_by_role("button", name="Regenerate").click()
    expect(replies(page)).to_have_count(1)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.keyboard.press("Alt+E")
    page.get_by_label("Edit the message").fill("What is a dict?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    edited = complete(site, "What is a dict?", temperature=0, max_tokens=30)
    assert [each["content"] for each in kept(page)] == ["What is a dict?", edited]

    page.get_by_role("button", name="New chat", exact=True).first.click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    page.get_by_role("button", name="What is a dict?", exact=True).click()
    expect(replies(page)).to_have_count(1)
    page.get_by_role("button", name="Delete What is a dict?").click()
    expect(page.locator(".message")).to_have_count(0)


def test_a_reply_streams_and_can_be_stopped(page: Page, site: Site) -> None:
    ask_for(page, temperature=0, max_tokens=1500, ignore_eos=True)
    page.goto(site.url)
    say(page, QUESTION)
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    expect(page.locator(".hop")).to_have_count(2)
    early = len(replies(page).inner_text())
    page.wait_for_function("n => document.querySelector('.message.assistant').innerText.length > n", arg=early + 50)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".note")).to_contain_text("stopped")
    tokens = int(re.findall(r"(\d+) tokens ·", page.locator(".note").inner_text())[0])
    whole = complete(site, QUESTION, temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    assert whole.startswith(kept(page)[1]["content"])


def test_a_node_dies_in_mid_reply(page: Page, site: Site) -> None:
    ask_for(page, temperature=0, max_tokens=400, ignore_eos=True)
    page.goto(site.url)
    say(page, QUESTION)
    last = page.locator(".hop").nth(1)
    expect(last).to_contain_text("4:8")
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    victim = last.get_attribute("title") or ""
    site.swarm.node_of(victim).kill()
    expect(page.locator(".detour")).to_contain_text("went on at")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=60_000)
    expect(page.locator(".note")).to_contain_text("400 tokens")
    expect(page.locator(".detour")).to_contain_text("went on at")
    assert victim[-6:] not in page.locator(".note").inner_text()
    assert kept(page)[1]["content"] == complete(site, QUESTION, temperature=0, max_tokens=400, ignore_eos=True)


def test_a_tokens_time(page: Page, site: Site) -> None:
    ask_for(page, temperature=0, max_tokens=12, ignore_eos=True)
    page.goto(site.url)
    say(page, QUESTION)
    page.get_by_role("button", name="Token times").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".token")).to_have_count(12)
    expect(dialog.locator("tbody tr")).to_have_count(3)
    dialog.locator(".token").nth(4).click()
    page.keyboard.press("ArrowRight")
    expect(dialog.locator(".token[aria-pressed=true]")).to_have_count(1)
    expect(dialog.locator(".token-detail > p").first).to_contain_text("Token 6")
    bar = dialog.locator(".token-detail > .stacked")
    widths = bar.evaluate("bar => [...bar.querySelectorAll('rect')].map(part => +part.getAttribute('width'))")
    assert len(widths) == 9
    assert sum(widths) == pytest.approx(1000, abs=1)
    assert axe_findings(page) == []
    page.keyboard.press("Escape")


def test_what_a_model_writes_is_harmless(page: Page, site: Site) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": ATTACKS}, "finish_reason": "stop"}]}
    name = "<img src=x onerror='window.hit = 8'>"
    hop = {"peer": name, "name": name, "start": 0, "end": 8}
    trace = {"choices": [], "swarm": {"tokens": [], "events": [{"kind": "route", "hops": [hop], "reason": name}]}}
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in (trace, chunk)) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto(site.url)
    say(page, ATTACKS)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    reply = replies(page)
    assert reply.locator("script, img, svg, iframe, style, form, button#send").count() == 0
    assert reply.locator("[onerror], [onload], [onclick], [onmouseover]").count() == 0
    links = reply.locator(".body a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert [link for link in links if link] == ["https://evil.example/x.png"]
    expect(reply).to_contain_text("<script>window.hit = 1</script>")
    page.reload()  # and again from what was kept
    expect(replies(page)).to_have_count(1)
    assert page.evaluate("window.hit") is None
    policy = httpx.get(site.url).headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


def test_markdown(page: Page, site: Site) -> None:
    table, code = "| a | b |\n| - | - |\n| 1 | 2 |", "```python\ndef f():\n    return 1\n```"
    text = f"# Title\n\n* **bold** and `code`\n\n{table}\n\n{code}\n"
    body = f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(site.url)
    say(page, QUESTION)
    reply = replies(page)
    expect(reply.locator("td")).to_have_text(["1", "2"])
    expect(reply.locator("li strong")).to_have_text("bold")
    expect(reply.locator(".hljs-keyword").first).to_have_text("def")
    reply.locator(".code").get_by_role("button", name="Copy").click()
    expect(reply.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n    return 1\n"


def test_errors_are_words(page: Page, site: Site, console: list[str]) -> None:
    ask_for(page, max_tokens=100_000)
    page.goto(site.url)
    say(page, QUESTION)
    expect(page.get_by_role("alert")).to_contain_text("maximum context length")
    assert [line for line in console if "400 (Bad Request)" not in line] == []
    console.clear()  # the browser's own note of the status
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_role("button", name="Done").click()
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Try again").click()
    sent = json.loads(request.value.post_data or "")
    assert sent["temperature"] == 0.5
    assert sent["messages"][0] == {"role": "system", "content": "Be short."}
    expect(replies(page)).to_have_count(1)
    page.keyboard.press("Escape")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_accessible(page: Page, site: Site, theme: Any, width: int) -> None:
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": width, "height": 800})
    text = "Text with [a link](https://example.org)\n\n```python\ndef f(): # comment\n    return '1' + 2\n```\n"
    body = f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto(site.url)
    say(page, QUESTION)
    expect(page.locator(".hljs-keyword").first).to_be_visible()
    assert axe_findings(page) == []
    page.get_by_role("button", name="Settings").click()
    assert axe_findings(page) == []
    page.get_by_role("button", name="Done").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    page.get_by_role("button", name="theme").click()
    assert axe_findings(page) == []


def test_a_gateway_that_wants_a_key(browser: Browser, site: Site, tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite")
    secret = keys.add("alice")
    keys.close()
    settings = replace(site.settings, host="0.0.0.0", keys_file=tmp_path / "keys.sqlite")
    with running(settings, lambda _: None) as gateway:
        url = gateway.url.removesuffix("v1").replace("0.0.0.0", "127.0.0.1")
        page = browser.new_page()  # whose console may say that the first requests were refused
        page.goto(url + "swarm.html")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.goto(url)
        expect(page.get_by_role("dialog")).to_be_visible()
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Done").click()
        expect(page.get_by_label("Model")).to_have_value("demo")
        expect(page.locator(".message.error")).to_have_count(0)
        page.goto(url + "swarm.html")
        expect(page.locator("svg.map rect.bar").first).to_be_visible()
        page.close()
