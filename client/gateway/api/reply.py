"""Sending answers: JSON, or server-sent events; and noticing that nobody wants them any more."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..errors import ApiError, as_api_error
from .call import Call

logger = logging.getLogger(__name__)
Answer = dict[str, Any] | AsyncGenerator[bytes, None]
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_CLOSED = 499  # what nginx logs for it


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class Reply:
    """A response for Starlette: runs ``work`` and sends what it gives. ``work`` is cancelled if the client hangs up.

    The headers wait for the first event, so that what fails before it is answered with its own status code.
    """

    def __init__(self, call: Call, work: Awaitable[Answer], done: Callable[[Call, int], None]) -> None:
        self._call, self._work, self._done = call, work, done
        self.status = CLIENT_CLOSED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            await asyncio.wait({sending})
            self._done(self._call, self.status)
        if not sending.cancelled():
            sending.result()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._work
            if isinstance(answer, dict):
                self.status = 200
                await JSONResponse(answer, headers=self._headers())(scope, receive, send)
                return
            async with aclosing(answer) as events:
                await self._stream(await anext(events), events, send)
        except Exception as error:
            api_error = self._explain(error)
            await JSONResponse(api_error.body, self.status, headers={**self._headers(), **api_error.headers})(
                scope, receive, send
            )

    async def _stream(self, first: bytes, events: AsyncGenerator[bytes, None], send: Send) -> None:
        headers = {**self._headers(), **_STREAM_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for each in events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            self.status = 200
        except Exception as error:  # too late for a status
            body = event(self._explain(error).body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _explain(self, error: Exception) -> ApiError:
        api_error = as_api_error(error)
        if api_error.status == 500:
            logger.error("%s failed", self._call.id, exc_info=error)
        self.status = api_error.status
        return api_error

    def _headers(self) -> dict[str, str]:
        headers = {"x-request-id": self._call.id}
        return {**headers, "x-swarm-route": self._call.route_text()} if self._call.route else headers


async def disconnected(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
