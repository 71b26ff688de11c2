"""How a command of ``swarm`` ends when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from swarm.commands.terminal import Failure, explain, tell


@contextmanager
def errors() -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 2; others of the swarm, one line and 1."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        failure = explain(error) or (Failure(str(error), 2) if isinstance(error, ValueError) else None)
        if failure is None:
            raise
        raise typer.Exit(tell(failure)) from None
