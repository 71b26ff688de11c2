"""Fields that take values of several kinds, checked as the kind that was given: so errors speak of nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Discriminator

TEXT, TEXTS, IDS, ID_LISTS, OBJECTS, OBJECT = "<text>", "<texts>", "<ids>", "<id lists>", "<objects>", "<object>"
"""pydantic's tags for kinds. They get into the places of errors, from where :func:`without_kinds` takes them."""


def one_of(words: str, *, empty: str = TEXTS) -> Discriminator:
    """For a union whose members have tags.

    Args:
        words: what it can be, for errors.
        empty: what a list is that has nothing in it.
    """

    def kind(value: Any) -> str | None:
        if isinstance(value, str):
            return TEXT
        if isinstance(value, (dict, BaseModel)):
            return OBJECT
        if not isinstance(value, list):
            return None
        if not value:
            return empty
        first = value[0]
        return {int: IDS, list: ID_LISTS, dict: OBJECTS}.get(type(first), TEXTS)

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"has to be {words}")


def without_kinds(place: tuple[int | str, ...]) -> tuple[str, ...]:
    """Where an error is in the request, as its sender knows it."""
    return tuple(str(part) for part in place if not str(part).startswith("<"))
