"""``python -m tests.swarm_e2e.skewed SECONDS COMMAND …``: one of our commands on a machine whose clock is off."""

from __future__ import annotations

import sys
import time


def main() -> None:
    ahead, right = float(sys.argv[1]), time.time
    time.time = lambda: right() + ahead
    sys.argv = sys.argv[2:]
    if sys.argv[0] == "swarm":
        from swarm.client.cli import main as command
    else:
        from swarm.node.cli import main as command
    command()


if __name__ == "__main__":
    main()
