"""What the engine says about itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

_RECENT = 64


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine. The totals only ever grow.

    ``cache_tokens_free`` is what nobody uses or was promised, in pages of all blocks; ``cache_block_tokens_free``
    counts each block's tokens, and only what sessions asked for (:meth:`.admission.Admissions.free_block_tokens`);
    ``cache_bytes`` what keys and values of ``cache_tokens`` take in all blocks; ``waiting`` counts work that has not
    ended, ``queued`` sessions that wait for cache; ``reused_tokens`` were in another session's cache already,
    ``handed_over_tokens`` in that of a node that left.
    ``recent_step_s`` are the seconds of the latest batches, newest last.
    """

    sessions: int
    cache_tokens: int
    cache_tokens_free: int
    cache_block_tokens_free: int
    cache_bytes: int
    waiting: int
    queued: int
    prefill_tokens: int
    decode_tokens: int
    dense_tokens: int
    reused_tokens: int
    handed_over_tokens: int
    batches: int
    failures: int
    busy_s: float
    recent_step_s: tuple[float, ...]


@dataclass
class Counters:
    """The part of :class:`EngineStats` that is counted. The engine's thread counts, any thread may look."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    dense_tokens: int = 0
    reused_tokens: int = 0
    batches: int = 0
    failures: int = 0
    busy_s: float = 0.0
    recent_step_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def ran(self, seconds: float) -> None:
        """A batch took ``seconds``."""
        self.batches += 1
        self.busy_s += seconds
        self.recent_step_s.append(seconds)

    def stats(self, **now: Any) -> EngineStats:
        """All of it, with the figures of the moment, which are not counted."""
        return EngineStats(**(vars(self) | {"recent_step_s": tuple(self.recent_step_s)}), **now)
