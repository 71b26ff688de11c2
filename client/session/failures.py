"""What is done about an error, by its owner: the one place where a client decides whether to ask elsewhere."""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Protocol

from hivemind.p2p import PeerID

from swarm.errors import OutOfCacheError, Owner, SwarmError

from ..routing.left_out import Needs
from ..routing.route import Leg
from ..settings import ClientSettings
from .protocols import View

_FULL_RETRY_SECONDS = 0.5


class Course(enum.Enum):
    """What to do about an error of a peer."""

    RAISE = "raise"
    ASK_ANOTHER = "ask another"  # and nothing counts against this one
    ASK_LATER = "ask later"
    ASK_AGAIN = "ask again"
    LEAVE_OUT = "leave out"


def course(error: SwarmError, *, refused_before: bool, forgiven_before: bool) -> Course:
    """What to do about ``error``.

    Args:
        refused_before: the same work was refused for the same blocks, mostly by another peer.
        forgiven_before: the same peer was asked again for the same work, which has not gone on since.
    """
    if isinstance(error, OutOfCacheError):
        return Course.ASK_LATER
    if error.owner is Owner.NOBODY:
        return Course.LEAVE_OUT if forgiven_before else Course.ASK_AGAIN
    if error.owner is Owner.MACHINE or (error.owner is Owner.CALLER and refused_before):
        return Course.RAISE
    # a single peer may be wrong about it: it may be of another version, or have smaller limits
    return Course.ASK_ANOTHER if error.owner is Owner.CALLER else Course.LEAVE_OUT


class Asked(Protocol):
    """A leg or a hop: a peer that was asked to do the blocks ``start:end``."""

    @property
    def peer_id(self) -> PeerID: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class Failures:
    """What one piece of work, such as a step, has met on its way. It ends when it is refused twice, or when there is no
    route for ``wait_timeout`` seconds in all, or no room for so long, and it has not gone on in between."""

    def __init__(self, view: View, settings: ClientSettings) -> None:
        self._view, self._wait_timeout = view, settings.wait_timeout
        self._refused: list[Asked] = []
        self._forgiven: set[PeerID] = set()
        self._waited = 0.0
        self._full_since: float | None = None
        self._furthest = -1
        self._restarts = view.peer.restarts  # of the own daemon, when the route was found

    def progress(self, at: int) -> None:
        """The work has come to ``at``, whatever that counts: if that is further than ever, waiting starts anew."""
        if at > self._furthest:
            self._furthest, self._waited, self._full_since = at, 0.0, None
            self._forgiven.clear()

    @property
    def patience(self) -> float:
        """Seconds that are left to wait for room."""
        since = time.monotonic() if self._full_since is None else self._full_since
        return max(0.0, since + self._wait_timeout - time.monotonic())

    async def route(self, first: int, last: int, needs: Needs) -> tuple[Leg, ...]:
        """As :meth:`SwarmView.route`, if possible around peers that refused.

        Raises:
            SwarmError: as there.
        """
        began = time.monotonic()
        self._restarts = self._view.peer.restarts
        try:
            return await self._view.route(
                first,
                last,
                needs,
                avoid={asked.peer_id for asked in self._refused},
                patience=max(0.0, self._wait_timeout - self._waited),
            )
        finally:
            self._waited += time.monotonic() - began

    async def met(self, asked: Asked, error: SwarmError, *, restarts: int | None = None, ago: float = 0.0) -> None:
        """Counts an error against its owner. That of a connection which ended with the own daemon is nobody's.

        Args:
            restarts: of the own daemon, when the connection was opened; default: when the route was found.
            ago: how many seconds before now it happened.

        Raises:
            SwarmError: it is ``error``, and to ask elsewhere is of no use.
            DaemonError: no peer can be reached, as this process's daemon is gone for good.
        """
        peer_id = asked.peer_id
        if error.owner is Owner.NETWORK:
            await self._view.peer.check_daemon()
            if self._view.peer.restarts != (self._restarts if restarts is None else restarts):
                return
        refused_before = any(other.start < asked.end and asked.start < other.end for other in self._refused)
        decided = course(error, refused_before=refused_before, forgiven_before=peer_id in self._forgiven)
        if decided is Course.RAISE:
            raise error
        if decided is Course.ASK_ANOTHER:
            self._refused.append(asked)
        elif decided is Course.ASK_LATER:
            self._view.full(peer_id)
            self._full_since = self._full_since or time.monotonic()
            if not self.patience:
                raise error
        elif decided is Course.ASK_AGAIN:
            self._forgiven.add(peer_id)
        else:
            self._view.failed(peer_id, error, ago)

    async def pause(self, *errors: BaseException | None, share: float = 1.0) -> None:
        """Waits a little if one of ``errors``, that were just met, says that a peer is full: room may come soon."""
        if any(isinstance(error, OutOfCacheError) for error in errors):
            await asyncio.sleep(_FULL_RETRY_SECONDS * share)


class Trial(Failures):
    """Work that is done along given legs, or not at all: the first error ends it."""

    def __init__(self, view: View, settings: ClientSettings, legs: tuple[Leg, ...]) -> None:
        super().__init__(view, settings)
        self._legs = legs

    async def route(self, first: int, last: int, needs: Needs) -> tuple[Leg, ...]:
        """The given legs."""
        return self._legs

    async def met(self, asked: Asked, error: SwarmError, *, restarts: int | None = None, ago: float = 0.0) -> None:
        """Counts an error as usual, and raises it."""
        await super().met(asked, error, restarts=restarts, ago=ago)
        raise error
