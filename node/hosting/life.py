"""Runs what ``server.py`` starts until it is told to stop, and may be told so while it still starts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

T = TypeVar("T")


async def run_until(
    stop: asyncio.Event,
    start: Callable[[AsyncExitStack], Awaitable[T]],
    leave: Callable[[T], Awaitable[None]] | None = None,
    work: Callable[[T], Awaitable[None]] | None = None,
) -> None:
    """Starts, works until ``stop``, then leaves; a start that is under way is given up. ``start`` gets the stack of
    what is to be ended at last. What it raises is raised here, and so is what ``work`` raises, after leaving."""
    async with AsyncExitStack() as stack:
        starting = await finish_unless(stop, start(stack))
        if starting is None:
            return
        started = starting.result()
        working = await finish_unless(stop, work(started)) if work is not None else None
        if working is None or working.exception() is None:
            await stop.wait()
        if leave is not None:
            await leave(started)
        if working is not None:
            working.result()


async def together(*works: Awaitable[None]) -> None:
    """Does them all. The first that fails ends the others, and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def finish_unless(stop: asyncio.Event, work: Awaitable[T]) -> asyncio.Future[T] | None:
    """Waits for ``work``, and returns it when it has ended, in any way; ``None``: it was given up for ``stop``."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return working
    working.cancel()
    await asyncio.wait({working})
    return None
