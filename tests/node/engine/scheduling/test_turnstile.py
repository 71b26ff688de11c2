"""Processes go through a turnstile one at a time."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm.node.engine.scheduling import turnstile
from swarm.node.engine.scheduling.turnstile import Turnstile, open_turnstile

_GO_THROUGH = """
import sys, time
from pathlib import Path
from swarm.node.engine.scheduling.turnstile import Turnstile
turnstile = Turnstile(Path(sys.argv[1]))
print("up", flush=True)
sys.stdin.readline()
for _ in range(20):
    turnstile.enter()
    began = time.monotonic()
    time.sleep(0.005)
    print(began, time.monotonic(), flush=True)
    turnstile.leave()
"""


def _others(folder: Path, count: int, script: str = _GO_THROUGH) -> list[subprocess.Popen[str]]:
    found = []
    for _ in range(count):
        argv = [sys.executable, "-c", script, str(folder)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        found.append(process)
    return found


def test_one_at_a_time_and_nobody_is_kept_out(tmp_path: Path) -> None:
    processes = _others(tmp_path, 3)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    turns = sorted(
        (*map(float, line.split()), who) for who, output in enumerate(outputs) for line in output.splitlines()
    )
    assert len(turns) == 60
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(turns))
    first_done = min(max(turn[1] for turn in turns if turn[2] == who) for who in range(3))
    waited = [sum(turn[2] == who and turn[1] <= first_done for turn in turns) for who in range(3)]
    assert min(waited) >= 5, "while one goes through twenty times, the others do too"


def test_who_stays_in_for_ever_or_dies_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "_LONGEST_WAIT_S", 0.2)
    (stuck,) = _others(tmp_path, 1, _GO_THROUGH.replace("time.sleep(0.005)", "print('in', flush=True); time.sleep(60)"))
    mine = Turnstile(tmp_path)
    assert stuck.stdin is not None
    assert stuck.stdout is not None
    stuck.stdin.write("\n")
    stuck.stdin.flush()
    assert stuck.stdout.readline() == "in\n"
    begin = time.monotonic()
    mine.enter()
    assert time.monotonic() - begin >= 0.2
    mine.leave()
    monkeypatch.setattr(turnstile, "_LONGEST_WAIT_S", 60.0)
    begin = time.monotonic()
    mine.enter()
    mine.leave()
    assert time.monotonic() - begin < 30, "it doesn't wait again so soon"
    monkeypatch.setattr(mine, "_without_until", 0.0)
    stuck.kill()
    stuck.communicate()
    mine.enter()
    assert mine._inside
    mine.leave()
    mine.leave()


def test_only_nodes_that_use_most_of_the_cores_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert open_turnstile(4) is None
    assert open_turnstile(5) is not None


def test_files_of_another_user_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Turnstile(tmp_path)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(OSError, match="another user"):
        Turnstile(tmp_path)
