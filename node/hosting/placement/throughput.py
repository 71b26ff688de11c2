"""How fast this node is, measured on its own blocks: no file of old results, no call to anybody."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ...engine.engine import Engine

_FORWARD_TOKENS = 64


@dataclass(frozen=True)
class Throughput:
    """Rows per second through one block: one at a time (decode) and many together (forward)."""

    inference_rps: float
    forward_rps: float


def measure(engine: Engine, first: int, last: int, hidden_size: int, *, seconds: float = 0.5) -> Throughput:
    """Runs decode steps for ``seconds`` and one forward. Warms the engine up on the way."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, 1, hidden_size, generator=generator) * 0.02
    session = engine.open(rows=1, first=first, last=last)
    try:
        engine.step(session, token, start=0).result()
        engine.step(session, token, start=1).result()
        steps, begin = 0, time.perf_counter()
        while steps < 32 and (steps < 2 or time.perf_counter() - begin < seconds):
            engine.step(session, token, start=2 + steps).result()
            steps += 1
        step_seconds = (time.perf_counter() - begin) / steps
    finally:
        engine.close(session)
    many = torch.randn(1, _FORWARD_TOKENS, hidden_size, generator=generator) * 0.02
    begin = time.perf_counter()
    engine.forward(many, first=first, last=last).result()
    forward_seconds = time.perf_counter() - begin
    blocks = last - first
    return Throughput(blocks / step_seconds, blocks * _FORWARD_TOKENS / forward_seconds)
