"""Hypothesis strategies from JSON schemas, as far as the gateway's own description of its API uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
"""Half characters among them: what JSON can carry, and no text may have."""
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(),
    TEXT,
)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


def from_schema(schema: Any, parts: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values of ``schema``, whose references are looked up in ``parts``."""
    if schema in (True, {}):
        return JSON
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: from_schema(parts[name], parts))
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([from_schema(option, parts) for option in schema[union]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return _typed(schema, parts)


def _typed(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    kind = schema.get("type")
    if kind == "string":
        return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else TEXT
    if kind == "integer":
        most = schema.get("maximum", schema.get("exclusiveMaximum", 2**70) - 1)
        return st.integers(schema.get("minimum", -(2**70)), most)
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_nan=False, allow_infinity=False)
    if kind == "array":
        items = from_schema(schema.get("items", True), parts)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=4)
    if kind == "object":
        return _object(schema, parts)
    return {"boolean": st.booleans(), "null": st.none()}[str(kind)]


def _object(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    fields = {name: from_schema(field, parts) for name, field in schema.get("properties", {}).items()}
    required = {name: fields[name] for name in schema.get("required", ())}
    optional = {name: field for name, field in fields.items() if name not in required}
    known = st.fixed_dictionaries(required, optional=optional)
    more = schema.get("additionalProperties", not fields)
    if more is False:
        return known
    names = st.integers(0, 3000).map(str) | TEXT
    others = st.dictionaries(names, from_schema(more, parts), max_size=3)
    return st.tuples(others, known).map(lambda pair: {**pair[0], **pair[1]})
