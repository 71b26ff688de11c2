"""A session along hops without a network: what is opened anew, and with which rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID

from swarm.client.routing.route import Leg
from swarm.client.routing.slowness import Move
from swarm.client.session.route_session import RouteSession
from swarm.client.session.trace import RouteEvent
from swarm.client.settings import ClientSettings
from swarm.errors import OutOfCacheError
from tests.client.routing.test_routing import peer, span
from tests.client.session.fakes import FakeHop, FakeView, lost

SPANS = [span("a", 0, 4, rps=300), span("b", 4, 8, rps=300), span("c", 0, 4, rps=100), span("d", 4, 8, rps=100)]


class Session(RouteSession):
    """Its hops are fake ones."""

    def __init__(self) -> None:
        view: Any = FakeView(SPANS)
        super().__init__(view, ClientSettings(), first=0, last=8, max_length=64, hidden_size=1)
        self.opened: list[FakeHop] = []
        self.refusing: list[PeerID] = []
        self.events: list[RouteEvent] = []
        self.on_route = self.events.append

    async def _dial(self, leg: Leg, before: PeerID, left_padding: Sequence[int], *args: Any) -> Any:
        if leg.peer_id in self.refusing:
            raise OutOfCacheError("full")
        hop = FakeHop(leg)
        hop.pusher = before
        hop.left_padding = tuple(left_padding)
        self.opened.append(hop)
        return hop


def inputs(columns: int, first: float = 0.0) -> torch.Tensor:
    return torch.arange(first, first + 2 * columns).reshape(2, columns, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_a_hop_that_fails_is_replaced_and_nothing_changes(which: int) -> None:
    async def run() -> torch.Tensor:
        session, whole = Session(), Session()
        for each in (session, whole):
            await each.step(inputs(5), None, None)
        failed: Any = session.hops[which]
        failed.broken = lost()
        order = torch.tensor([1, 1])
        outputs = [await each.step(inputs(1, 10.0), order, None) for each in (session, whole)]
        assert torch.equal(*outputs)
        assert failed.ended == "abandoned"
        assert failed not in session.hops
        assert len(session.opened) == 3
        assert [hop.pusher for hop in session.hops] == [session._view.peer.peer_id, session.hops[0].peer_id]
        return outputs[0]

    asyncio.run(run())


def test_padding_stays_with_its_row_when_all_hops_were_opened_anew() -> None:
    """A hop counts rows as they were when it was opened, which need not be as they were when the session began."""

    async def run() -> None:
        session = Session()
        await session.step(inputs(5), None, (0, 3))
        await session.step(inputs(1), torch.tensor([1, 0]), None)
        session._pipeline.abandon()  # as after an interrupted step
        await session.step(inputs(1), None, None)
        assert [hop.left_padding for hop in session.hops] == [(3, 0), (3, 0)]
        failed: Any = session.hops[0]
        failed.broken = lost()
        await session.step(inputs(1), None, None)
        assert [hop.left_padding for hop in session.hops] == [(3, 0), (3, 0)]

    asyncio.run(run())


def test_a_step_that_fails_for_good_is_as_if_it_had_not_been() -> None:
    async def run() -> None:
        session = Session()
        first = await session.step(inputs(5), None, None)
        for hop in session.hops:
            hop.broken = ZeroDivisionError()  # type: ignore[assignment]
        with pytest.raises(ZeroDivisionError):
            await session.step(inputs(1, 10.0), None, None)
        assert session.position == 5
        assert not session.hops
        expected = Session()
        assert torch.equal(first, await expected.step(inputs(5), None, None))
        outputs = [await each.step(inputs(1, 20.0), None, None) for each in (session, expected)]
        assert torch.equal(*outputs)

    asyncio.run(run())


@pytest.mark.parametrize("refused", [False, True])
def test_a_slow_hop_is_left_or_kept_and_nothing_changes(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        session, whole = Session(), Session()
        for each in (session, whole):
            await each.step(inputs(5), None, None)
            await each.step(inputs(1, 10.0), torch.tensor([1, 1]), None)
        before: list[Any] = list(session.hops)
        move = Move(before[1], (Leg(SPANS[3], 4, 8),), 0.3, 0.04, 1.0, 1.0)
        session.refusing = [peer("d")] if refused else []
        due = iter([move])
        monkeypatch.setattr(session._slowness, "due", lambda *_: next(due, None))
        for first in (20.0, 30.0):
            outputs = [await each.step(inputs(1, first), None, None) for each in (session, whole)]
            assert torch.equal(*outputs)
        view: Any = session._view
        kinds = [event.kind for event in session.events]
        if refused:
            assert session.hops == before
            assert kinds == ["route"]
            assert view.were_full == [peer("d")]
            assert not before[1].ended
        else:
            assert [hop.peer_id for hop in session.hops] == [peer("a"), peer("d")]
            assert kinds == ["route", "left", "replaced"]
            assert session.events[1].reason == "a step takes 300 ms, elsewhere about 40 ms"
            assert before[1].ended == "closed"
            assert view.were_slow == [peer("b")]
        assert not view.left_out

    asyncio.run(run())
