"""The peak of loading: the span's weights and little more, whatever the checkpoint's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_checkpoint, make_config

PROGRAM = """
import sys, torch
from swarm.skeleton import load_span
from swarm.source import resolve
path, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

source = resolve(path)
load_span(source, 0, 1, dtype=torch.bfloat16, device="cpu")  # what is needed once, whatever is loaded
open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
before = peak()
span = load_span(source, start, end, dtype=torch.bfloat16, device="cpu")
print(span.parameter_bytes, peak() - before)
"""


@pytest.mark.parametrize(("like", "options"), [("llama-gqa", {}), ("mixtral", {"intermediate": 1024})])
def test_the_peak_is_the_span_and_fifteen_percent(tmp_path: Path, like: str, options: dict[str, int]) -> None:
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 4, "intermediate": 4096, "layers": 9, **options}
    path = make_checkpoint(tmp_path / "m", make_config(like, dtype="bfloat16", **sizes), max_shard_bytes=100 << 20)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), "2", "8"], capture_output=True, text=True, check=True
    )
    weights, peak = map(int, done.stdout.split())
    assert weights > 120 << 20
    assert peak <= 1.15 * weights
