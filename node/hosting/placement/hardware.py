"""What the machine offers."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from swarm.errors import UsageError
from swarm.wire.codec import DTYPES


def choose_devices(wanted: str) -> tuple[torch.device, ...]:
    """The devices that ``wanted`` names. ``"auto"`` is the first of CUDA, MPS and CPU that is there, ``"cuda"`` all
    visible GPUs, ``"cuda:0,cuda:2"`` some of them.

    Raises:
        UsageError: no such device on this machine, or several that can't work together.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and count:
        return tuple(torch.device("cuda", index) for index in range(count))
    devices: list[torch.device] = []
    for name in wanted.split(","):
        try:
            device = torch.device(name.strip())
        except RuntimeError as error:
            raise UsageError(
                f"--device {wanted!r} is not one of auto, cpu, cuda, cuda:N, cuda:N,cuda:M,…, mps"
            ) from error
        if device.type == "cuda" and (device.index or 0) >= count:
            raise UsageError(f"--device {name} is not there: this machine has {count} CUDA devices")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UsageError("--device mps is not there on this machine")
        devices.append(device)
    if len(devices) > 1 and (
        len(set(devices)) < len(devices) or any(one.type != "cuda" or one.index is None for one in devices)
    ):
        raise UsageError(f"--device {wanted}: several devices must be different GPUs, such as cuda:0,cuda:1")
    return tuple(devices)


def choose_dtype(wanted: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` is the checkpoint's dtype; on a CPU float16, which it computes slowly, becomes bfloat16.

    Raises:
        UsageError: not a dtype that a node computes in.
    """
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cpu" and checkpoint == torch.float16 else checkpoint
    dtype = DTYPES.get(wanted)
    if dtype is None or not dtype.is_floating_point:
        raise UsageError(f"--dtype {wanted!r} is not one of auto, float32, bfloat16, float16")
    if dtype == torch.float16 and device.type == "cpu":
        raise UsageError("--dtype float16 is slow and imprecise on a CPU: take bfloat16 or float32")
    return dtype


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(min(int(line.split()[1]) * 1024, _left_in_container()))
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: half of what is built in


def _left_in_container(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes until the limit that a container sets; infinite without one. ``/proc/meminfo`` is about the whole machine.

    Files that are cached count as used, but go when memory is needed.
    """
    version_2 = (root / "memory.max", root / "memory.current", root / "memory.stat", "inactive_file")
    old = root / "memory"
    version_1 = (
        old / "memory.limit_in_bytes",
        old / "memory.usage_in_bytes",
        old / "memory.stat",
        "total_inactive_file",
    )
    for limit, usage, statistics, cached in (version_2, version_1):
        try:
            pairs = dict(line.split() for line in statistics.read_text().splitlines())
            return max(0, int(limit.read_text()) - int(usage.read_text()) + int(pairs.get(cached, 0)))
        except (OSError, ValueError):  # no such version; or no limit, which is spelled "max"
            continue
    return math.inf
