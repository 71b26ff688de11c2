"""What the engine counts."""

from __future__ import annotations

from swarm.node.engine.stats import Counters


def test_totals_and_the_latest_batches() -> None:
    counters = Counters()
    counters.decode_tokens += 3
    for number in range(100):
        counters.ran(float(number))
    now = dict.fromkeys(("sessions", "waiting", "queued", "cache_bytes", "handed_over_tokens"), 1)
    cache = dict.fromkeys(("cache_tokens", "cache_tokens_free", "cache_block_tokens_free"), 2)
    stats = counters.stats(**now, **cache)
    assert (stats.batches, stats.busy_s, stats.decode_tokens, stats.prefill_tokens) == (100, 4950.0, 3, 0)
    assert stats.recent_step_s == tuple(map(float, range(36, 100)))
    assert (stats.sessions, stats.cache_tokens) == (1, 2)
    counters.ran(1.0)
    assert stats.batches == 100, "a moment, that stays"
