"""A swarm as its gateway sees it, for ``swarm status`` and ``swarm top`` with ``--api``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx

from swarm.errors import ConnectError, RemoteError, UsageError
from swarm.network.overview import Overview

from .http import make_async_client


async def watch_gateway(url: str, key: str | None, model: str | None, *, interval: float) -> AsyncIterator[Overview]:
    """The swarm of ``model`` (or of the gateway's only one) now, and again every ``interval`` seconds.

    Raises:
        ConnectError: nobody answers at ``url``.
        RemoteError: it is no gateway of ours, or wants a key.
        UsageError: it doesn't serve ``model``, or ``url`` is none.
    """
    async with make_async_client(url, key, httpx.Timeout(10)) as http:
        while True:
            try:
                answer = await http.get("/api/swarm")
            except httpx.HTTPError as error:
                raise ConnectError(f"can't reach a gateway at {url}: {error or type(error).__name__}") from error
            if answer.is_error:
                raise RemoteError(
                    f"{url} answered {answer.status_code}: is it a swarm's gateway, and is the key right?"
                )
            try:
                overviews = [Overview.from_dict(fields) for fields in answer.json()["models"]]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RemoteError(f"{url} is no gateway of a swarm: {error}") from error
            yield _pick(overviews, model)
            await asyncio.sleep(interval)


def _pick(overviews: list[Overview], model: str | None) -> Overview:
    wanted = [overview for overview in overviews if model in (None, overview.model)]
    if len(wanted) != 1:
        known = ", ".join(overview.model for overview in overviews) or "none"
        raise UsageError(f"say which MODEL: the gateway serves {known}")
    return wanted[0]
