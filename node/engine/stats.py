"""What the engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine. The totals only ever grow.

    ``cache_tokens_free`` is what nobody uses or was promised, in pages of all blocks; ``cache_block_tokens_free``
    counts each block's tokens, and only what sessions asked for (:meth:`.admission.Admissions.free_block_tokens`);
    ``cache_bytes`` what keys and values of ``cache_tokens`` take in all blocks; ``waiting`` counts work that has not
    ended, ``queued`` sessions that wait for cache; ``reused_tokens`` were in another session's cache already.
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
    batches: int
    failures: int
    busy_s: float
    recent_step_s: tuple[float, ...]
