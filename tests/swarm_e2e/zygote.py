"""Starts ``swarm-node`` and ``swarm`` in a fraction of a second: imports everything once, then forks for each.

Reads a JSON object a line, ``{"argv": [command, …], "stdin": path, "stdout": path, "stderr": path, "env": {…},
"netns": name}``; answers with the PID, and ``{"wait": pid}`` with the exit code. If stdout is null it is a pipe that
nobody reads; ``netns`` is the network namespace to run in, or null. Only the time for importing torch and transformers
is saved: the command line, the entry point and the process are real.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_NEW_NET = 0x40000000


def main(prepare: Callable[[dict[str, Any]], None] = lambda order: None) -> None:
    """``prepare`` is given each order, in the new process, before its command runs."""
    from swarm.compat.late_imports import importing

    with importing():  # as the commands do
        import swarm.client.cli
        import swarm.client.commands.talk
        import swarm.client.model.facade
        import swarm.commands.status
        import swarm.node.cli
        import swarm.node.hosting.server
        import swarm.node.output
        from tests.swarm_e2e import modeling  # noqa: F401

    commands = {"swarm": swarm.client.cli.main, "swarm-node": swarm.node.cli.main}
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if order.get("netns"):
                _enter(order["netns"])
            os.environ.update(order["env"])
            os.dup2(_unread() if order["stdout"] is None else _appended(order["stdout"]), 1)
            os.dup2(_appended(order["stderr"]), 2)
            os.dup2(os.open(order["stdin"], os.O_RDONLY), 0)
            sys.argv = order["argv"]
            os.environ["COLUMNS"] = "200"
            code = 70
            try:
                prepare(order)
                commands[sys.argv[0]]()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else end.code is not None
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)


def _enter(namespace: str) -> None:
    """Moves this process into a network namespace of ``ip netns``; Python has ``os.setns`` from 3.12 on."""
    with open(f"/run/netns/{namespace}") as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _NEW_NET):
            raise OSError(ctypes.get_errno(), f"can't enter the network namespace {namespace}")


def _appended(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _unread() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


if __name__ == "__main__":
    main()
