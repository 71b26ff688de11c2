"""Whether peers live: a peer that computes for long answers a small question meanwhile, a frozen one doesn't."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from hivemind.p2p import PeerID

from swarm.errors import PeerLostError
from swarm.network.calls import look_at

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FLOOR_SECONDS = 1.0  # Python's lock alone delays an answer by tenths of a second where a node computes or loads
_ROUND_TRIPS = 2.0  # of the slowest of the last ones
_KEPT = 16
_TICKS = 10
_ASK_AGAIN_SECONDS = 1.0
_IDLE_SECONDS = 30.0
_WATCHED_SECONDS = 60.0  # for so long a silent peer is asked again; its record ends about then, too


def answer_seconds(round_trips: Iterable[float], longest: float) -> float:
    """How long to wait for a peer's answer, from how long its answers took lately; ``longest`` if none is known."""
    return min(max(longest, _FLOOR_SECONDS), max(_FLOOR_SECONDS, _ROUND_TRIPS * max(round_trips, default=longest)))


class Pulse:
    """Asks peers whether they live, each by one question at a time, whoever wants to know. Lives in one event loop.

    A peer that has not answered counts as silent until it does. After ``longest`` seconds of silence the connection to
    it is closed: it may be the connection that died, and the next question opens another one. If nothing was heard of
    the peer for long before, as after a night's sleep, that is more likely, and done at once.

    Args:
        ask: asks a peer, for so many seconds at most; raises what went wrong.
        disconnect: closes the connection to a peer.
        on_back: is told of a peer that answers over another connection.
    """

    def __init__(
        self,
        ask: Callable[[PeerID, float], Awaitable[object]],
        disconnect: Callable[[PeerID], Awaitable[object]],
        on_back: Callable[[PeerID], None],
        longest: float,
    ) -> None:
        self._ask_peer, self._disconnect, self._on_back, self._longest = ask, disconnect, on_back, longest
        self._round_trips: dict[PeerID, deque[float]] = {}
        self._asking: dict[PeerID, asyncio.Task[bool]] = {}
        self._heard: dict[PeerID, float] = {}
        self._silent: dict[PeerID, float] = {}
        self._watching: set[asyncio.Task[None]] = set()

    def note(self, peer_id: PeerID, seconds: float) -> None:
        """A round trip to a peer took so long."""
        self._round_trips.setdefault(peer_id, deque(maxlen=_KEPT)).append(seconds)
        self.heard(peer_id)

    def heard(self, peer_id: PeerID) -> None:
        """A peer has just said something."""
        self._heard[peer_id] = time.monotonic()

    def knows(self, peer_id: PeerID) -> bool:
        """Whether the peer has ever answered."""
        return peer_id in self._round_trips

    def silent_for(self, peer_id: PeerID) -> float | None:
        """Seconds since a peer was asked that has not answered since; None if there is no such question."""
        since = self._silent.get(peer_id)
        return None if since is None else time.monotonic() - since

    async def lives(self, peer_id: PeerID) -> bool:
        """Whether the peer answers in time."""
        if peer_id in self._silent:
            return False
        if peer_id not in self._asking:
            task = self._asking[peer_id] = asyncio.create_task(self._ask(peer_id))
            task.add_done_callback(lambda _: self._asking.pop(peer_id, None))
        return await asyncio.shield(self._asking[peer_id])

    def close(self) -> None:
        """Asks no more."""
        for task in (*self._asking.values(), *self._watching):
            task.cancel()

    async def _ask(self, peer_id: PeerID) -> bool:
        began = time.monotonic()
        seconds = answer_seconds(self._round_trips.get(peer_id, ()), self._longest)
        call = asyncio.ensure_future(self._ask_peer(peer_id, self._longest + seconds))
        try:
            # in turns of our own event loop, which may have stood still itself: a laptop that slept, a long computation
            for _ in range(_TICKS):
                await asyncio.wait({call}, timeout=seconds / _TICKS)
                if call.done():
                    call.result()
                    self.note(peer_id, time.monotonic() - began)
                    return True
        except Exception:
            return False  # it can't be reached
        except asyncio.CancelledError:
            call.cancel()
            raise
        self._silent[peer_id] = began
        task = asyncio.create_task(self._watch(peer_id, began, seconds, call))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
        return False

    async def _watch(self, peer_id: PeerID, since: float, allowed: float, call: asyncio.Future[object]) -> None:
        """Until a silent peer answers; ``call`` is the first question, which was ``allowed`` so many seconds."""
        cut = False
        if self._heard.get(peer_id, since) < since - _IDLE_SECONDS:
            call.cancel()
        try:
            while time.monotonic() < since + _WATCHED_SECONDS:
                await asyncio.wait({call})
                if not call.cancelled() and call.exception() is None:
                    if time.monotonic() < since + _ROUND_TRIPS * allowed:
                        self.note(peer_id, time.monotonic() - since)  # it was only slow, and has more time next time
                    if cut:
                        self._on_back(peer_id)
                    return
                if not cut:
                    cut = True
                    logger.info("%s is silent; closing the connection to it, for another one", peer_id)
                    with suppress(Exception):
                        await self._disconnect(peer_id)
                else:
                    await asyncio.sleep(_ASK_AGAIN_SECONDS)
                call = asyncio.ensure_future(self._ask_peer(peer_id, self._longest))
        finally:
            call.cancel()
            self._silent.pop(peer_id, None)


async def watched(work: Awaitable[T], peer_id: PeerID, patience: float, lives: Callable[[], Awaitable[bool]]) -> T:
    """What ``work`` gives, which waits for a peer. While it is overdue, the peer is asked whether it lives.

    Args:
        patience: seconds until it is overdue.
        lives: whether to go on waiting.

    Raises:
        PeerLostError: the peer is silent.
    """
    task = asyncio.ensure_future(work)
    asking: asyncio.Future[bool] | None = None
    try:
        await asyncio.wait({task}, timeout=patience)
        while not task.done():
            asking = asyncio.ensure_future(lives())
            await asyncio.wait({task, asking}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                break
            if not asking.result():
                raise PeerLostError(f"{peer_id} does not answer")
            await asyncio.wait({task}, timeout=max(patience, _ASK_AGAIN_SECONDS))
        return task.result()
    finally:
        for pending in (task, asking):
            if pending is not None:
                pending.cancel()
                pending.add_done_callback(look_at)
