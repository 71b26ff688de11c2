"""Who is let in: by API key, or on an open gateway by the address that the request was made to."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ApiError
from .access import Access
from .keys import Key
from .rate_limits import RateLimits


class Guard:
    """ASGI middleware. Pages and ``/healthz`` need no key.

    Without keys a web page elsewhere must not be able to use the gateway through its visitor's browser: neither by a
    request across origins (checked by Origin), nor after pointing a name of its own at this machine (checked by Host).
    """

    def __init__(self, app: ASGIApp, access: Access, limits: RateLimits) -> None:
        self._app, self._limits = app, limits
        self._keys, self._hosts, self._origins = access.keys, access.hosts, access.cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                key = await self._admit(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, send)

    async def _admit(self, path: str, headers: Headers) -> Key | None:
        if (host := headers.get("host")) and not _name(host):
            raise ApiError(400, f"{host!r} is not the name of a host")
        if self._keys is None:
            self._check_browser(headers)
            return None
        if not path.startswith(("/v1/", "/api/")) and path != "/metrics":
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, "You didn't provide an API key: send it as Authorization: Bearer KEY.")
        key = await self._keys.find(token.strip())
        if key is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        if path.startswith("/v1/") and not path.startswith("/v1/models"):
            self._limits.admit(key)
        return key

    def _check_browser(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise ApiError(403, f"this gateway is not known as {host!r}: ask it by its own address", code="wrong_host")
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if _parts(origin).netloc != host:
            raise ApiError(
                403, f"pages of {origin} may not use this gateway: see --cors-origin", code="origin_not_allowed"
            )


def _name(host: str) -> str:
    """A Host header without its port; empty if it is malformed."""
    return _parts(f"//{host}").hostname or ""


def _parts(url: str) -> SplitResult:
    """Those of ``url``; none of what can't be taken apart."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # found out to be none only when it is asked for
    except ValueError:
        return urlsplit("")
    return parts
