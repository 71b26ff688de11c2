"""Hidden states between the memory of the machine and that of a GPU."""

from __future__ import annotations

import torch


def staged(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` where a copy to ``device`` need not be waited for: in pinned memory, for a GPU."""
    return host.pin_memory() if device.type == "cuda" else host


def to_device(host: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """``host`` in ``dtype`` on ``device``."""
    host = host.to(dtype)
    return host if device.type == "cpu" else staged(host, device).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` in the machine's memory; from a GPU in pinned memory, which torch keeps and uses again."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.device(tensor.device):
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    return host
