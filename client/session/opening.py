"""Opening all hops of a route: at once, or one after the other where somebody has to wait for room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from swarm.errors import SwarmError

from ..routing.route import Leg
from .hop import Hop


async def open_together(ways: Sequence[Callable[..., Awaitable[Hop]]]) -> list[Any]:
    """Opens all hops at once: for each the hop, or the error."""
    opening = [asyncio.ensure_future(way()) for way in ways]
    try:
        return await asyncio.gather(*opening, return_exceptions=True)
    except asyncio.CancelledError:
        for task in opening:  # nobody else knows those that are open by now
            task.add_done_callback(_abandon)
        raise


async def open_in_order(
    legs: Sequence[Leg], ways: Sequence[Callable[..., Awaitable[Hop]]], wait: float
) -> list[Hop | BaseException | None]:
    """Opens hops one by one, queueing where that is needed; up to the first that fails, with the error for it."""
    results: list[Hop | BaseException | None] = [None] * len(legs)
    for index in sorted(range(len(legs)), key=lambda index: legs[index].peer_id.to_bytes()):
        try:
            results[index] = await ways[index](wait=wait)
        except BaseException as error:
            results[index] = error
            if isinstance(error, SwarmError):
                break
            for hop in results:
                if isinstance(hop, Hop):
                    hop.abandon()
            raise
    return results


def _abandon(opening: asyncio.Future[Hop]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abandon()
