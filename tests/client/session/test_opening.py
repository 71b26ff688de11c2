"""Opening a session at all hops of a route, over hops without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.client.routing.left_out import Needs
from swarm.client.session import failures as failures_module
from swarm.client.session.failures import Failures
from swarm.client.session.opening import open_route
from swarm.client.settings import ClientSettings
from swarm.errors import BadRequestError, MissingBlocksError, OutOfCacheError
from tests.client.routing.test_routing import peer, span
from tests.client.session.fakes import Dialer, FakeHop, FakeView, lost

SPANS = [span("a", 0, 4, rps=300), span("b", 4, 8, rps=300), span("c", 4, 8, rps=100), span("d", 0, 4, rps=100)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures_module, "_FULL_RETRY_SECONDS", 0.0)


def open_all(dialer: Dialer, view: FakeView, wait_timeout: float = 5.0) -> list[FakeHop]:
    async def run() -> list[Any]:
        return await open_route(
            dialer, Failures(view, ClientSettings(wait_timeout=wait_timeout)), 0, 8, Needs(), peer("client")
        )

    return asyncio.run(run())


def test_the_quickest_route_is_opened() -> None:
    dialer = Dialer()
    hops = open_all(dialer, FakeView(SPANS))
    assert [hop.peer_id for hop in hops] == [peer("a"), peer("b")]
    assert [hop.pusher for hop in hops] == [peer("client"), peer("a")]
    assert [hop.ended for hop in hops] == ["", ""]


def test_another_takes_the_place_of_one_that_fails_and_nothing_stays_open() -> None:
    dialer, view = Dialer(), FakeView(SPANS)
    dialer.errors[peer("b")] = [lost()]
    hops = open_all(dialer, view)
    assert [hop.peer_id for hop in hops] == [peer("a"), peer("c")]
    assert set(view.left_out) == {peer("b")}
    assert [hop.ended for hop in dialer.opened if hop not in hops] == ["abandoned"]


def test_hops_queue_in_one_order_where_one_was_full() -> None:
    """Whoever held one hop while waiting for another could wait for ever, so the order is the same for everybody."""
    dialer, view = Dialer(), FakeView(SPANS[:2])
    dialer.errors[peer("b")] = [OutOfCacheError("full"), OutOfCacheError("full")]
    hops = open_all(dialer, view)
    assert [hop.peer_id for hop in hops] == [peer("a"), peer("b")]
    assert view.were_full == [peer("b")] * 2
    assert not view.left_out
    in_order = sorted([peer("a"), peer("b")], key=lambda each: each.to_bytes())
    assert [each for each, wait in dialer.waits if wait][-2:] == in_order
    assert all(wait >= 1 for _, wait in dialer.waits[2:])


def test_full_for_too_long_is_raised() -> None:
    dialer = Dialer()
    dialer.errors[peer("b")] = [OutOfCacheError("full")] * 1000
    with pytest.raises(OutOfCacheError):
        open_all(dialer, FakeView(SPANS[:2]), wait_timeout=0.0)
    assert {hop.ended for hop in dialer.opened} == {"abandoned"}


def test_two_refusals_end_it_and_count_against_nobody() -> None:
    dialer, view = Dialer(), FakeView(SPANS)
    dialer.errors = {peer("b"): [BadRequestError("too long")], peer("c"): [BadRequestError("too long")]}
    with pytest.raises(BadRequestError, match="too long"):
        open_all(dialer, view)
    assert not view.left_out
    assert {hop.ended for hop in dialer.opened} == {"abandoned"}


def test_one_refusal_asks_another() -> None:
    dialer = Dialer()
    dialer.errors[peer("b")] = [BadRequestError("too long")]
    assert [hop.peer_id for hop in open_all(dialer, FakeView(SPANS))] == [peer("a"), peer("c")]


def test_nobody_left() -> None:
    dialer = Dialer()
    dialer.errors[peer("a")] = [lost()]
    with pytest.raises(MissingBlocksError):
        open_all(dialer, FakeView(SPANS[:2]))


def test_what_is_no_error_of_a_peer_is_raised_at_once() -> None:
    dialer, view = Dialer(), FakeView(SPANS)
    dialer.errors[peer("b")] = [ZeroDivisionError()]
    with pytest.raises(ZeroDivisionError):
        open_all(dialer, view)
    assert not view.left_out
    assert [hop.ended for hop in dialer.opened] == ["abandoned"]


@pytest.mark.parametrize("crowded", [False, True])
def test_nothing_stays_open_when_the_caller_gives_up(crowded: bool) -> None:
    async def run() -> Dialer:
        dialer, view = Dialer(), FakeView(SPANS[:2])
        if crowded:
            dialer.errors[peer("b")] = [OutOfCacheError("full")]
        opening = asyncio.create_task(
            open_route(dialer, Failures(view, ClientSettings(wait_timeout=5.0)), 0, 8, Needs(), peer("client"))  # type: ignore[arg-type]
        )
        while len(dialer.waits) < (3 if crowded else 1):
            await asyncio.sleep(0)
            dialer.delay = 0.05 if len(dialer.waits) == (2 if crowded else 0) else dialer.delay
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(0.1)
        return dialer

    dialer = asyncio.run(run())
    assert dialer.opened
    assert {hop.ended for hop in dialer.opened} == {"abandoned"}
