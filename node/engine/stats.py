"""What the engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine. The totals only ever grow.

    ``waiting`` counts work that has not ended; ``recent_step_s`` are the seconds of the latest batches, newest last.
    """

    sessions: int
    cache_tokens: int
    cache_tokens_free: int
    waiting: int
    prefill_tokens: int
    decode_tokens: int
    dense_tokens: int
    batches: int
    failures: int
    busy_s: float
    recent_step_s: tuple[float, ...]
