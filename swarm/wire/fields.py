"""What strangers send, checked field by field against a dataclass's annotations, by msgspec."""

from __future__ import annotations

import sys
from typing import Annotated, Any, TypeVar

import msgspec
from hivemind.p2p import PeerID

from .peer_id import read_peer_id

T = TypeVar("T")
Natural = Annotated[int, msgspec.Meta(ge=0)]
"""A whole number that is not negative."""
Number = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
"""A number, whole or not, that is finite and not negative."""


def read(kind: type[T], found: Any) -> T:
    """The dataclass ``kind`` of what stands in ``found``, a dict. Other fields in it are ignored; None is as if a field
    weren't there. Nothing is taken for what it isn't: no bool for a number, no text for bytes. A list is a tuple.

    Raises:
        ValueError: no dict, or a field is missing, or has a type or value that it can't have.
    """
    if not isinstance(found, dict):
        raise ValueError("the fields are to be a dict")
    given = {name: value for name, value in found.items() if value is not None and isinstance(name, str)}
    try:
        return msgspec.convert(given, kind, builtin_types=(bytes,), dec_hook=_peer_id)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:  # before 0.21 it is no ValueError
        raise ValueError(str(error)) from error


def _peer_id(_: type, text: Any) -> PeerID:
    """The one type that msgspec doesn't know."""
    return read_peer_id(text)
