"""What a field of a settings dataclass says of its option on the command line: ``port: Annotated[int, Option(…)] = 0``.

Nothing is imported here, so that settings can be used without a command line. ``swarm/commands/builder.py`` reads it.
Modules with settings don't import annotations from ``__future__``: each start would have to evaluate them as texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NETWORK = "Network"  # the panel of --help


@dataclass(frozen=True)
class Form:
    """How the command line writes a value, if not as the field holds it.

    Attributes:
        type: what the command line takes.
        read: makes the field's value of it.
        write: the other way round, for the default.
    """

    type: Any
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


@dataclass(frozen=True)
class Option:
    """An option; its type and its default are the field's.

    Attributes:
        env: environment variable.
        panel: heading in ``--help``.
        flags: its names; default: the field's name after ``--``.
        positional: it is an argument and has no flags.
    """

    help: str | None = None
    env: str | None = None
    panel: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    form: Form | None = None
    positional: bool = False


class Only:
    """On a dataclass: a command has these of its options, in this order. The other fields keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


def _split(values: list[str] | None) -> tuple[str, ...]:
    """Repeated values, or values with commas or spaces between them, as one list."""
    return tuple(part for value in values or () for part in value.replace(",", " ").split())


def _split_at_commas(values: list[str] | None) -> tuple[str, ...]:
    return tuple(part for value in values or () for part in value.split(",") if part)


def _listed(values: tuple[str, ...]) -> list[str] | None:
    return list(values) or None


LIST = Form(list[str] | None, _split, _listed)
PATHS = Form(list[str] | None, _split_at_commas, _listed)  # a path may have spaces
MEGABYTES = Form(float, lambda megabytes: megabytes * 1e6, lambda count: count / 1e6)
