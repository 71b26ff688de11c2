"""From the bytes of a body to a request, and in what words it is refused."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from ..errors import ApiError, invalid
from .kinds import without_kinds

R = TypeVar("R", bound=BaseModel)
_BOM = b"\xef\xbb\xbf"
_WORDS = {"dict_type": "has to be an object", "model_type": "has to be an object", "missing": "is missing"}
"""Where pydantic speaks of Python, or of our classes."""


def parse(schema: type[R], body: bytes) -> R:
    """A request. Every string of it is text: half of a surrogate pair, which Python's own parser lets in, is refused.

    Raises:
        ApiError: 400.
    """
    try:
        fields = from_json(body.removeprefix(_BOM), allow_inf_nan=False)
    except ValueError as error:
        why = " (half of a surrogate pair is no text)" if "hex escape" in str(error) else ""
        raise invalid(f"the body is not JSON: {error}{why}") from error
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise refused(error) from error


def refused(error: ValidationError, *inside: str) -> ApiError:
    """The first of what is wrong; ``inside`` is the place that was checked, if it isn't the whole request."""
    first = error.errors()[0]
    place = (*inside, *without_kinds(first["loc"]))
    if not place:
        return invalid("the body has to be a JSON object")
    return invalid(f"{'.'.join(place)}: {_message(first)}", place[0])


def _message(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":  # one of ours, without pydantic's words in front
        return str(detail["ctx"]["error"])
    return _WORDS.get(detail["type"], detail["msg"])
