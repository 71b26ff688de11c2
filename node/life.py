"""The life of what runs until it is told to stop, and may be told so while it still starts."""

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
) -> None:
    """Starts, waits for ``stop``, then leaves; a start that is under way is given up. ``start`` gets the stack of what
    is to be ended at last. What it raises is raised here."""
    async with AsyncExitStack() as stack:
        starting = asyncio.ensure_future(start(stack))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
        else:
            started = starting.result()
            await stopping
            if leave is not None:
                await leave(started)
        stopping.cancel()
