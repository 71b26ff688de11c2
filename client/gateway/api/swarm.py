"""``/api/swarm``: what the pages, ``swarm status`` and ``swarm top`` show of the swarm."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import ApiError
from ..node_history import COLUMNS
from ..swarm_watch import SwarmWatch
from .reply import disconnected

_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _now(request: Request) -> Response:
    """The swarm of each model, and how to join it."""
    return Response(await request.app.state.gateway.watch.latest(), media_type="application/json")


async def _events(request: Request) -> Response:
    """The same as server-sent events, a second apart."""
    return Events(request.app.state.gateway.watch)


async def _node(request: Request) -> Response:
    """What a node did in the last ten minutes."""
    peer_id = request.path_params["peer_id"]
    points = request.app.state.gateway.watch.history.points(peer_id)
    if points is None:
        raise ApiError(404, f"no node {peer_id} was seen in the last ten minutes", code="node_not_found")
    return JSONResponse({"peer_id": peer_id, "columns": COLUMNS, "points": points})


class Events(Response):
    """Every look at the swarm as a server-sent event, until the client hangs up or the gateway ends."""

    def __init__(self, watch: SwarmWatch) -> None:
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.wait({sending})
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in _STREAM.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._watch.stream()) as looks:
            async for look in looks:
                await send({"type": "http.response.body", "body": b"data: " + look + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


ROUTES = [
    Route("/api/swarm", _now),
    Route("/api/swarm/events", _events),
    Route("/api/swarm/nodes/{peer_id}", _node),
]
