"""The web application: which path is answered by what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from .access.access import Access
from .access.guard import Guard
from .access.rate_limits import RateLimits
from .api.call import Call
from .api.chat import chat
from .api.completions import complete
from .api.embeddings import embed
from .api.openapi import describe_api
from .api.reply import Answer, Reply
from .api.responses import respond
from .api.swarm import ROUTES as SWARM_ROUTES
from .decode.admission import ASKER
from .errors import ApiError, as_api_error
from .metrics import Metrics
from .requests.parse import parse
from .requests.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest
from .served_model import ServedModel
from .static import Pages
from .swarm_watch import SwarmWatch

PAGES = Path(__file__).with_name("pages")
_PART_SECONDS = 30.0
_MAX_BODY_BYTES = 16 * 2**20
R = TypeVar("R", bound=BaseModel)
Handler = Callable[[ServedModel, R, Call], Awaitable[Answer]]
_ENDPOINTS: dict[str, tuple[type[Any], Handler[Any], str]] = {
    "/v1/chat/completions": (ChatRequest, chat, "messages"),
    "/v1/completions": (CompletionRequest, complete, "prompt"),
    "/v1/embeddings": (EmbeddingRequest, embed, "input"),
    "/v1/responses": (ResponsesRequest, respond, "input"),
}
"""By path: the request, who answers it, and its field that is logged as the prompt."""


class Gateway:
    """Everything that requests share.

    Args:
        log: is called with the fields of each request that is done.
        log_prompts: whether prompts are among the fields.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        watch: SwarmWatch,
        metrics: Metrics,
        access: Access,
        log: Callable[[dict[str, Any]], None],
        *,
        log_prompts: bool = False,
    ) -> None:
        self.models, self.watch, self.metrics, self.access = models, watch, metrics, access
        self.limits = RateLimits()
        self._log, self._log_prompts = log, log_prompts

    def model(self, name: str) -> ServedModel:
        """The model of this name, or one with the LoRA adapter of this name.

        Raises:
            ApiError: 404.
        """
        if name not in self.models:
            every = self.served()
            if name in every:
                return every[name]
            known = ", ".join(every)
            raise ApiError(
                404, f"The model {name!r} does not exist: there is {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    def served(self) -> dict[str, ServedModel]:
        """All models, and with each its LoRA adapters, which are models of their own to those who ask."""
        every = dict(self.models)
        for base in self.models.values():
            for adapted in base.adapters():
                every.setdefault(adapted.id, adapted)
        return every

    def done(self, call: Call, status: int) -> None:
        """Counts and logs a request."""
        self.metrics.count(call, status)
        keys = self.access.keys
        if call.key is not None and keys is not None:
            self.limits.used(call.key, call.prompt_tokens + call.completion_tokens)
            keys.count(call.key, call.prompt_tokens, call.completion_tokens)
        fields: dict[str, Any] = {
            "event": "request",
            "time": round(time.time(), 3),
            "id": call.id,
            "key": call.key,
            "endpoint": call.endpoint,
            "model": call.model,
            "status": status,
            "seconds": round(time.monotonic() - call.begin, 4),
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            **call.times(),
            "route": call.route_text(),
        }
        if self._log_prompts:
            fields["prompt"] = call.prompt
        self._log(fields)


def make_app(gateway: Gateway, pages: Path = PAGES) -> Starlette:
    """The ASGI application. Whatever has no other path is looked for in ``pages``."""
    answered = [
        Route("/healthz", _health),
        Route("/metrics", _metrics),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        *SWARM_ROUTES,
        *(_endpoint(path, *endpoint) for path, endpoint in _ENDPOINTS.items()),
    ]
    described = JSONResponse(describe_api(answered, {path: schema for path, (schema, _, _) in _ENDPOINTS.items()}))
    routes = [
        *answered,
        Route("/openapi.json", described),
        Route("/v1/{rest:path}", _nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        Route("/api/{rest:path}", _nothing),
        Mount("/", Pages(directory=pages, html=True)),
    ]
    access = gateway.access
    guard = Middleware(Guard, access=access, limits=gateway.limits)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(access.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-swarm-route", "x-request-id", "retry-after"],
    )
    app = Starlette(
        routes=routes,
        middleware=[cors, guard] if access.cors_origins else [guard],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _api_error},
    )
    app.state.gateway = gateway
    return app


def _endpoint(path: str, schema: type[R], handler: Handler[R], prompt_field: str) -> Route:
    @wraps(handler, assigned=("__doc__",))
    async def answer(request: Request) -> Reply:
        gateway: Gateway = request.app.state.gateway
        key = request.state.key
        call = Call(path, None if key is None else key.name)
        ASKER.set(call.key or (request.client.host if request.client else ""))
        try:
            raw = await _read(request)
            body = parse(schema, raw)
            call.prompt = getattr(body, prompt_field)
            model = gateway.model(body.model)  # type: ignore[attr-defined]
            call.model, call.size = model.id, len(raw)
        except ApiError as error:
            gateway.done(call, error.status)
            raise
        return Reply(call, handler(model, body, call), gateway.done)

    return Route(path, answer, methods=["POST"])


async def _read(request: Request) -> bytes:
    parts, size, stream = [], 0, request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(stream, None), _PART_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"nothing more of the request has come for {_PART_SECONDS:.0f} seconds") from None
        if part is None:
            break
        size += len(part)
        if size > _MAX_BODY_BYTES:
            raise ApiError(413, f"the request is larger than {_MAX_BODY_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


async def _health(request: Request) -> Response:
    """Whether the gateway runs, and for which models; 503 while its network daemon doesn't."""
    models = request.app.state.gateway.models
    up = all(model.peer.p2p.is_up for model in models.values())
    status = "ok" if up else "the network daemon is down"
    return JSONResponse({"status": status, "models": list(models)}, 200 if up else 503)


async def _metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.gateway.metrics.text(), media_type="text/plain; version=0.0.4")


async def _models(request: Request) -> Response:
    """The models, LoRA adapters among them."""
    models = request.app.state.gateway.served().values()
    return JSONResponse({"object": "list", "data": [model.describe() for model in models]})


async def _model(request: Request) -> Response:
    """One of the models."""
    return JSONResponse(request.app.state.gateway.model(request.path_params["name"]).describe())


async def _nothing(request: Request) -> Response:
    raise HTTPException(404, "there is no such endpoint")


async def _api_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    return JSONResponse(answer.body, answer.status, headers=answer.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.scope['path']}: {error.detail}"  # its URL has the Host header, which may be odd
    )
    code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
    return JSONResponse(ApiError(error.status_code, message, code=code).body, error.status_code, headers=error.headers)
