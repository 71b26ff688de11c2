"""The pages' files, under a policy that lets a page run and load nothing but them."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, answered with 304
}


class Pages(StaticFiles):
    """Static files with :data:`HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, or ``index.html`` of a folder."""
        response: Any = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response  # type: ignore[no-any-return]
