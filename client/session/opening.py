"""Opening a session at all hops of a route."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from hivemind.p2p import PeerID

from swarm.chance import CHANCE
from swarm.errors import OutOfCacheError, SwarmError

from ..routing.left_out import Needs
from ..routing.route import Leg
from .failures import Failures
from .protocols import HopLike

logger = logging.getLogger(__name__)

Prefix = tuple[bytes, list[bytes] | None]
"""The context and the names under which a hop may have the beginning of a session."""


class Dial(Protocol):
    """Opens a session at one hop, which gets steps pushed by the peer ``before``, and is ready to queue for ``wait``
    seconds.

    Raises:
        SwarmError: the hop can't be reached, is full, or refuses.
    """

    async def __call__(self, leg: Leg, before: PeerID, prefix: Prefix | None, *, wait: float = 0.0) -> Any: ...


async def open_route(
    dial: Dial,
    failures: Failures,
    first: int,
    last: int,
    needs: Needs,
    before: PeerID,
    prefixes: Callable[[Sequence[Leg]], Sequence[Prefix | None]] | None = None,
) -> list[Any]:
    """Opens a session at each hop of the best route; looks for another route while one of them fails.

    Where there is no way around a hop without room, it queues there. Then hops are opened one after the other, in an
    order that is the same for everybody: who held one hop while waiting for another could wait for ever.

    Args:
        before: whoever pushes steps to the first hop.
        prefixes: for the hops of a route what they may have in their caches already; None: nothing.

    Raises:
        MissingBlocksError: there is no route within the time to wait.
        OutOfCacheError: every node that could be asked is full.
        BadRequestError: the session was refused twice.
    """
    crowded: set[PeerID] = set()
    while True:
        legs = await failures.route(first, last, needs)
        known = [None] * len(legs) if prefixes is None else prefixes(legs)
        pushers = [before, *(leg.peer_id for leg in legs)][: len(legs)]
        ways = [partial(dial, *way) for way in zip(legs, pushers, known, strict=True)]
        if crowded.isdisjoint(leg.peer_id for leg in legs):
            opened = await _open_together(ways)
        else:
            opened = await _open_in_order(legs, ways, max(1.0, failures.patience))
        errors = [(leg, one) for leg, one in zip(legs, opened, strict=True) if isinstance(one, BaseException)]
        if not errors:
            return opened
        _abandon_all(opened)
        for leg, error in errors:
            if not isinstance(error, SwarmError):
                raise error
            logger.info("Blocks %d:%d: %s", leg.start, leg.end, error)
            await failures.met(leg, error)
        crowded |= {leg.peer_id for leg, error in errors if isinstance(error, OutOfCacheError)}
        await failures.pause(*(error for _, error in errors), share=CHANCE.random())


async def _open_together(ways: Sequence[Callable[..., Any]]) -> list[Any]:
    """Opens all hops at once: for each the hop, or the error."""
    opening = [asyncio.ensure_future(way()) for way in ways]
    try:
        return await asyncio.gather(*opening, return_exceptions=True)
    except asyncio.CancelledError:
        for task in opening:  # nobody else knows those that are open by now
            task.add_done_callback(abandon)
        raise


async def _open_in_order(legs: Sequence[Leg], ways: Sequence[Callable[..., Any]], wait: float) -> list[Any]:
    """Opens hops one by one, queueing where that is needed; up to the first that fails, with the error for it."""
    results: list[Any] = [None] * len(legs)
    for index in sorted(range(len(legs)), key=lambda index: legs[index].peer_id.to_bytes()):
        try:
            results[index] = await ways[index](wait=wait)
        except BaseException as error:
            if not isinstance(error, SwarmError):
                _abandon_all(results)
                raise
            results[index] = error
            break
    return results


def _abandon_all(results: Sequence[HopLike | BaseException | None]) -> None:
    for hop in results:
        if hop is not None and not isinstance(hop, BaseException):
            hop.abandon()


def abandon(opening: asyncio.Future[Any]) -> None:
    """Leaves a hop that has been opened, if it has."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abandon()
