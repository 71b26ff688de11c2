"""The API's description for programs (OpenAPI 3.1), made from the routes and from what requests are checked with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter
from starlette.routing import Route

from ..errors import ErrorBody


def describe_api(routes: Iterable[Route], schemas: Mapping[str, type[Any]]) -> dict[str, Any]:
    """The document.

    Args:
        routes: each described by its function's docstring.
        schemas: of the bodies, by path.
    """
    adapters = [(path, "validation", TypeAdapter(schema)) for path, schema in schemas.items()]
    bodies, parts = TypeAdapter.json_schemas(
        [*adapters, ("error", "validation", TypeAdapter(ErrorBody))],  # type: ignore[list-item]
        ref_template="#/components/schemas/{model}",
    )
    of = {path: schema for (path, _), schema in bodies.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "swarm gateway", "version": version("swarm-llm")},
        "paths": {route.path_format: _path(route, of.get(route.path), of["error"]) for route in routes},
        "components": {"schemas": parts["$defs"]},
    }


def _path(route: Route, body: Any, error: Any) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": inspect.getdoc(route.endpoint),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ],
        "responses": {"200": {"description": "The answer."}, "default": {"description": "An error.", **_json(error)}},
    }
    if body is None:
        return {"get": operation}
    return {"post": {**operation, "requestBody": {"required": True, **_json(body)}}}


def _json(schema: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}
