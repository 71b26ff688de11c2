"""The demo as its user runs it; a node dies in the middle of the text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_text_is_identical_although_a_node_dies() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--kill-one", "--max-new-tokens", "24", "--chat"]
    done = subprocess.run(command, input="def main():\n\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kill -9" in done.stdout
    assert done.stdout.count("identical") == 2, "the text with the death in it, and the prompt after that"
    assert done.stdout.count("tokens/s") == 2


def test_nothing_is_left_running() -> None:
    shown = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    left = [line for line in shown.splitlines() if "serve demo --blocks" in line and "--name node-" in line]
    assert left == []
