"""The peak of loading: the span's weights and little more, whatever the checkpoint's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import make_checkpoint, make_config

PROGRAM = """
import sys, torch
from swarm.node.engine.blocks.finish import finish_block
from swarm.model.loading import load_span
from swarm.model.source import resolve
path, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def load(start, end):
    return load_span(source, start, end, dtype=torch.bfloat16, device="cpu", finish=lambda b: finish_block(b, None))

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

source = resolve(path)
load(0, 1)  # what is needed once, whatever is loaded
open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
before = peak()
span = load(start, end)
print(span.parameter_bytes, peak() - before)
"""


def load(path: Path, start: int, end: int) -> tuple[int, int]:
    """Bytes of the weights of these blocks, and the peak of loading them, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(start), str(end)]
    # else what glibc keeps of freed memory depends on how busy the machine is, by 50 MB
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    weights, peak = map(int, done.stdout.split())
    return weights, peak


@pytest.mark.parametrize(("like", "options"), [("llama-gqa", {}), ("mixtral", {"intermediate": 1024})])
def test_the_peak_is_the_span_and_fifteen_percent(tmp_path: Path, like: str, options: dict[str, int]) -> None:
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 4, "intermediate": 4096, "layers": 9, **options}
    path = make_checkpoint(tmp_path / "m", make_config(like, dtype="bfloat16", **sizes), max_shard_bytes=100 << 20)
    weights, peak = load(path, 2, 8)
    assert weights > 120 << 20
    assert peak <= 1.15 * weights


def test_the_peak_of_one_large_block(tmp_path: Path) -> None:
    """Whose largest matrices, of 64 MiB each, are not there twice when they are packed."""
    sizes = {"hidden": 2048, "heads": 16, "kv_heads": 4, "intermediate": 16384, "layers": 2}
    path = make_checkpoint(tmp_path / "m", make_config("llama-gqa", dtype="bfloat16", **sizes))
    weights, peak = load(path, 1, 2)
    assert weights > 200 << 20
    assert peak <= 1.15 * weights


def test_the_peak_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    """One weight at a time is in memory as float32 besides."""
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 4, "intermediate": 4096, "layers": 6}
    path = make_checkpoint(tmp_path / "m", make_config("llama-gqa", dtype="bfloat16", **sizes))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(*(-(-size // 128) for size in tensors[name].shape))
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    del tensors
    weights, peak = load(path, 2, 5)
    largest = 1024 * 4096
    assert weights > 80 << 20
    assert peak <= 1.15 * weights + largest * 4
