"""Keeping an invitation, in which there is a key, off the list of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

SECRETS = ("SWARM_KEY", "SWARM_JOIN")
"""Environment variables that may hold a key, and are never shown."""
_OPTION = "--join"


def hide_invitation() -> None:
    """If ``--join LINE`` is on the command line, where everybody on the machine can read it, begins anew with the line
    in the environment, which only the same user can read."""
    given = sys.argv[1:]
    kept, line = without_invitation(given)
    started = sys.orig_argv
    if line is None or started[-len(given) :] != given:  # the program was called by another one
        return
    arguments = [*started[: -len(given)], *kept]
    os.execve(sys.executable, [sys.executable, *arguments[1:]], {**os.environ, "SWARM_JOIN": line})


def without_invitation(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without ``--join LINE``, and the line; None: there is none, or what is given is a file."""
    for at, argument in enumerate(arguments):
        value, after = argument.removeprefix(f"{_OPTION}="), at + 1
        if argument == _OPTION and after < len(arguments):
            value, after = arguments[after], after + 1
        if argument.startswith(_OPTION) and value.startswith("swarm:"):
            return [*arguments[:at], *arguments[after:]], value
    return [*arguments], None
