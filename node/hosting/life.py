"""The life of what runs until it is told to stop, and may be told so while it still starts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

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
        starting = asyncio.ensure_future(start(stack))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await _give_up(starting)
        else:
            started = starting.result()
            working = asyncio.ensure_future(work(started)) if work is not None else stopping
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            failed = working is not stopping and working.done() and working.exception() is not None
            if not failed:
                await stopping
            if working is not stopping:
                await _give_up(working)
            if leave is not None:
                await leave(started)
            if failed:
                working.result()
        stopping.cancel()


async def _give_up(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
