"""Starts Petals' own server command, and unmodified Petals clients, in a fraction of their time: imports Petals once,
then forks for each.

Reads a JSON object a line, ``{"server": argv, "log": path}`` or ``{"client": socket, "log": path}``; answers with the
PID. A client takes its orders at the socket, see :mod:`driver`. Run by Petals' Python.

Petals forks a process for its DHT whenever a client connects. A process that is forked while another thread holds a
lock hangs at that lock for ever, so each client is a process of its own that has started no thread before it connects.
This process must have none either. (What hung most often was something else: see ``serve`` in :mod:`driver`.)
"""

import faulthandler
import json
import os
import signal
import sys


def become(order):
    """The life of a forked process: one server, or one client."""
    from hivemind.utils.mpfuture import MPFuture

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR1)  # says in the log where it hangs
    # hivemind's locks are shared by all processes that are forked after its import: one that is killed while it holds
    # them would stop all others
    MPFuture.reset_backend()
    if "server" in order:
        from petals.cli import run_server

        sys.argv = ["run_server", *order["server"]]
        run_server.main()
    else:
        import driver

        driver.serve(order["client"])


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what it imports prints
    import driver  # noqa: F401
    from petals.cli import run_server  # noqa: F401
    from petals.models import bloom, falcon, llama  # noqa: F401
    from petals.server import from_pretrained, server  # noqa: F401
    from petals.utils import peft  # noqa: F401

    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise SystemExit(f"{len(threads)} threads run: what is forked now may hang")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps what ends
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                become(order)
            finally:
                os._exit(0)
        print(pid, file=answers, flush=True)


if __name__ == "__main__":
    main()
