"""Errors as OpenAI's API has them: status code and body."""

from __future__ import annotations

import math

from typing_extensions import TypedDict  # typing's own is not enough for pydantic before Python 3.12

from swarm.errors import BadRequestError, MissingBlocksError, OutOfCacheError, SwarmError, UsageError


class ErrorFields(TypedDict):
    """What went wrong; ``param`` is the field of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is an error."""

    error: ErrorFields


class ApiError(Exception):
    """Answered with ``status`` and ``body``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: ErrorBody = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request can't be carried out as it is."""
    return ApiError(400, message, param=param, code=code)


def too_many(message: str, code: str, retry_after: float) -> ApiError:
    """Come back later."""
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after=retry_after)


def as_api_error(error: BaseException) -> ApiError:
    """What to answer when the swarm, or we, failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutOfCacheError):
        return too_many("the swarm has no KV cache left at the moment: try again later", "swarm_full", 5)
    if isinstance(error, (BadRequestError, UsageError)):
        return invalid(str(error))
    if isinstance(error, SwarmError):
        retry = 10 if isinstance(error, MissingBlocksError) else 2
        return ApiError(503, str(error), kind="server_error", code=type(error).code, retry_after=retry)
    return ApiError(500, "the gateway failed: its log says why", kind="server_error", code="internal_error")
