"""``scripts/chaos.py`` for 90 seconds: every kind of fault comes, and no caller notices more than a pause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = 3
TIMEOUT = 600
"""Seconds: what is under way when the 90 are over ends first."""


@pytest.fixture
def command(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = ["--seconds", "90", "--sessions", "4", "--seed", str(SEED), "--no-petals", "--save", str(tmp_path / "out")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "chaos.py"), *argv],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    yield process
    if process.poll() is None:  # it ends what it has started
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def test_no_fault_changes_a_token(command: subprocess.Popen[bytes], tmp_path: Path) -> None:
    code = command.wait(TIMEOUT)
    log = (tmp_path / "log").read_text()
    assert (tmp_path / "out").exists(), log[-6000:]
    outcome = json.loads((tmp_path / "out").read_text())
    for kind, count in outcome["faults"].items():
        assert count, f"{kind} did not come\n{log}"
    assert outcome["texts"] > 10
    assert outcome["wrong"] == []
    assert outcome["failed"] == []
    assert outcome["broken"] == [], log
    assert outcome["stuck"] == 0
    assert outcome["left"] == []
    assert code == 0
