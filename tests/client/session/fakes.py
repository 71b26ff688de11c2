"""Hops and a swarm without a network, behind the Protocols of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from hivemind.p2p import PeerID

from swarm.client.routing.left_out import Needs
from swarm.client.routing.pulse import Pulse
from swarm.client.routing.route import Claim, Leg, claims, find_route
from swarm.client.routing.slowness import Slowdowns
from swarm.client.routing.step_times import StepTimes
from swarm.client.session.history import History
from swarm.client.session.protocols import HopLike, View
from swarm.client.session.trace import Answered
from swarm.errors import PeerLostError, SwarmError
from swarm.network.dht import RemoteSpan
from swarm.wire.handover import TakeOver
from swarm.wire.limits import MessageLimits, limits_of

Compute = Callable[[torch.Tensor, int, "torch.Tensor | None"], torch.Tensor]
"""Inputs ``[rows, T, H]`` from column ``start`` on, with the rows reordered before, to outputs of the same shape."""


class FakeHop:
    """A hop that computes in this process. It passes its outputs on as a node does, and fails when it is told to.

    By default the output is the sum of all columns so far, so it shows whether a hop knows all that was before.
    """

    def __init__(self, leg: Leg, compute: Compute | None = None) -> None:
        self.peer_id, self.start, self.end = leg.peer_id, leg.start, leg.end
        self.name: str | None = leg.span.info.public_name
        self.session_id = f"{leg.peer_id}-{leg.start}"
        self.history = History()
        self.limits: MessageLimits = limits_of(leg.span.info)
        self.left_padding: tuple[int, ...] = ()
        self.is_petals, self.cropped = False, False
        self.reused, self.reorders, self.restarts = 0, 0, 0
        self.on_push_failed: Callable[[str], None] | None = None
        self.broken: SwarmError | None = None
        self.pusher: PeerID | None = None
        self.failed_at: float | None = None
        self.silent = False
        self.loses_pushes = False
        self.ended = ""  # how
        self.seen: list[tuple[int, int]] = []  # the start and the columns of each step that ran
        self._compute = compute or self._sums
        self._columns: torch.Tensor | None = None
        self._replies: dict[str, asyncio.Future[torch.Tensor]] = {}

    async def send(
        self,
        step_id: str,
        start: int,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None,
        next_hops: Sequence[Any],
        page_names: list[bytes] | None = None,
    ) -> None:
        if self.broken is not None:
            raise self.broken
        self.expect(step_id)
        if self.silent or self._replies[step_id].done():
            return
        self.seen.append((start, hidden.shape[1]))
        output = self._compute(hidden, start, hypo_ids)
        self._replies[step_id].set_result(output)
        if next_hops:
            if next_hops[0].broken is None and not self.loses_pushes:
                await next_hops[0].send(step_id, start, output, hypo_ids, next_hops[1:])
            elif self.on_push_failed is not None:
                self.on_push_failed(step_id)

    def expect(self, step_id: str) -> None:
        if step_id not in self._replies:
            self._replies[step_id] = asyncio.get_running_loop().create_future()

    def has_answered(self, step_id: str) -> bool:
        return step_id in self._replies and self._replies[step_id].done()

    async def reply(self, step_id: str, timeout: float) -> torch.Tensor | None:
        if self.broken is not None:
            raise self.broken
        await asyncio.wait({self._replies[step_id]}, timeout=timeout)
        return self._replies[step_id].result() if self._replies[step_id].done() else None

    def answered(self, step_id: str) -> Answered | None:
        return Answered(0.0, 0.0, 0.0) if self.has_answered(step_id) else None

    def forget(self, step_id: str) -> None:
        self._replies.pop(step_id, None)

    def handover(self, seconds: float) -> TakeOver | None:
        return None

    async def let_push(self, peer_id: PeerID) -> None:
        self.pusher = peer_id

    async def close(self) -> None:
        self.ended = "closed"

    def abandon(self) -> None:
        self.ended = self.ended or "abandoned"

    def _sums(self, hidden: torch.Tensor, start: int, hypo_ids: torch.Tensor | None) -> torch.Tensor:
        before = hidden[:, :0] if self._columns is None else self._columns[:, :start]
        assert before.shape[1] == start, f"{self.name} has {before.shape[1]} columns, and gets a step from {start} on"
        if hypo_ids is not None:
            before = before[hypo_ids]
        self._columns = torch.cat([before, hidden], dim=1)
        return self._columns.cumsum(dim=1)[:, start:]


class FakeView:
    """A swarm of ``spans``, all of them near."""

    def __init__(self, spans: Sequence[RemoteSpan]) -> None:
        self.spans = list(spans)
        self.left_out: dict[PeerID, SwarmError] = {}
        self.were_full: list[PeerID] = []
        self.good: list[PeerID] = []
        self.asked: list[Needs] = []
        self.were_slow: list[PeerID] = []
        self.step_times = StepTimes()
        self.slowdowns = Slowdowns()
        self.pulse = Pulse(self.answer, self.answer, self.succeeded, 1.0)

    @property
    def peer(self) -> FakeView:
        return self

    restarts = 0
    peer_id = PeerID(b"client")

    async def check_daemon(self) -> None:
        """It lives."""

    async def answer(self, *_: object) -> None:
        """All of them live."""

    async def is_worth_waiting(self, peer_id: PeerID, first: int, last: int, needs: Needs) -> bool:
        return await self.pulse.lives(peer_id)

    async def route(
        self,
        first: int,
        last: int,
        needs: Needs,
        *,
        avoid: Container[PeerID] = frozenset(),
        patience: float | None = None,
    ) -> tuple[Leg, ...]:
        self.asked.append(needs)
        usable = [span for span in self.spans if span.peer_id not in self.left_out]
        rather = [span for span in usable if span.peer_id not in avoid]
        try:
            return find_route(rather, first, last, rtts={})
        except SwarmError:
            return find_route(usable, first, last, rtts={})

    def succeeded(self, peer_id: PeerID) -> None:
        self.good.append(peer_id)

    def failed(self, peer_id: PeerID, error: SwarmError, ago: float = 0.0) -> None:
        self.left_out[peer_id] = error

    def full(self, peer_id: PeerID) -> None:
        self.were_full.append(peer_id)

    def slow(self, peer_id: PeerID) -> None:
        self.were_slow.append(peer_id)

    def leg(self, peer_id: PeerID, start: int, end: int) -> Leg | None:
        return next((Leg(span, start, end) for span in self.spans if span.peer_id == peer_id), None)

    def around(self, peer_id: PeerID, start: int, end: int, needs: Needs) -> tuple[Leg, ...]:
        return find_route([span for span in self.spans if span.peer_id != peer_id], start, end, rtts={})

    def claims(self, legs: Sequence[Leg]) -> list[Claim]:
        return claims(legs, {})


class Dialer:
    """Opens fake hops. ``errors`` has for a peer what its next openings raise."""

    def __init__(self, make: Callable[[Leg], FakeHop] = FakeHop) -> None:
        self.errors: dict[PeerID, list[BaseException]] = {}
        self.opened: list[FakeHop] = []
        self.waits: list[tuple[PeerID, float]] = []
        self.delay = 0.0
        self._make = make

    async def __call__(self, leg: Leg, before: PeerID, prefix: object, *, wait: float = 0.0) -> FakeHop:
        await asyncio.sleep(self.delay)
        self.waits.append((leg.peer_id, wait))
        if self.errors.get(leg.peer_id):
            raise self.errors[leg.peer_id].pop(0)
        self.opened.append(self._make(leg))
        self.opened[-1].pusher = before
        return self.opened[-1]


def lost(text: str = "gone") -> PeerLostError:
    return PeerLostError(text)


def _satisfy(hop: FakeHop, view: FakeView) -> tuple[HopLike, View]:
    """For the type checker."""
    return hop, view
