"""HTTP clients for ``--api``."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import httpx

from swarm.errors import UsageError


def http_options(url: str, key: str | None) -> dict[str, Any]:
    """What both clients of httpx are made with. The base URL has no ``/v1``, which users give or don't."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return {"base_url": url.rstrip("/").removesuffix("/v1"), "headers": headers}


def make_client(url: str, key: str | None, timeout: httpx.Timeout) -> httpx.Client:
    """A client of the API at ``url``.

    Raises:
        UsageError: that is no URL.
    """
    transport = httpx.HTTPTransport() if is_here(url) else None
    return httpx.Client(**http_options(url, key), timeout=timeout, transport=transport)


def make_async_client(url: str, key: str | None, timeout: httpx.Timeout) -> httpx.AsyncClient:
    """The same for an event loop."""
    transport = httpx.AsyncHTTPTransport() if is_here(url) else None
    return httpx.AsyncClient(**http_options(url, key), timeout=timeout, transport=transport)


def is_here(url: str) -> bool:
    """Whether ``url`` is of this machine itself: proxies, which the environment may name, don't lead there. httpx takes
    none when it is given a transport.

    Raises:
        UsageError: it is no URL.
    """
    try:
        there = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"--api {url} is no URL: {error}") from None
    if (there.port or 0) > 65535:
        raise UsageError(f"--api {url} is no URL: there is no such port")
    try:
        return ip_address(there.host).is_loopback
    except ValueError:
        return there.host == "localhost" or there.host.endswith(".localhost")
