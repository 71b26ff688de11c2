"""How a command of ``swarm-node`` runs: until it is told to stop, in an orderly way."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from swarm.commands.terminal import explain, flush, outlive_readers

from ..settings import LogFormat

if TYPE_CHECKING:
    from ..output import Output


def open_output(log_format: LogFormat) -> Output:
    """The output of a command that goes on when nobody reads it any more."""
    from ..output import make_output

    outlive_readers()
    return make_output(log_format.value)


def print_secret(text: str) -> None:
    """Prints it, into a file that nobody else can read if it goes into one."""
    number = sys.stdout.fileno()
    if stat.S_ISREG(os.fstat(number).st_mode):
        os.fchmod(number, 0o600)
    print(text)


def run_until_stopped(run: Callable[[asyncio.Event], Awaitable[None]], say_error: Callable[[str], None]) -> None:
    """Runs with SIGINT and SIGTERM as an orderly stop, and ends the process with 0, 1 or 2."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await run(stop)

    code = 0
    try:
        import uvloop

        uvloop.run(main())
    except SystemExit as end:  # rich's, when nobody reads any more
        code = int(end.code or 0)
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        if failure.text:
            say_error(failure.text)
        code = failure.code
    # a load that was given up may still run in its thread; nothing is left that must be waited for
    os._exit(flush() or code)
