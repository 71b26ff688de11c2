"""The zygote of the tests, whose processes are probed and end with it, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from scripts.resilience.probe import PROBE, install
from tests.swarm_e2e import zygote


def prepare(order: dict[str, Any]) -> None:
    """In the new process, before its command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if PROBE in order["env"]:
        install(order["env"][PROBE])


def main() -> None:
    os.setsid()  # a Ctrl-C in the terminal is for the script, which ends this by closing its input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        zygote.main(prepare)
    finally:
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main()
