"""How long a prefill may hold up the sessions that decode."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pacer:
    """Measures what prefill costs, and sizes its pieces so that decoding sessions wait ``target_s`` for one at most.

    While nobody decodes, pieces are as large as the batch allows: that is the cheapest way through a prompt.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        target_s: float = 0.25,
        quiet_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_tokens = max_tokens
        self._target_s = target_s
        self._quiet_s = quiet_s
        self._clock = clock
        self._token_s = 0.0
        self._last_decode = float("-inf")

    def prefill_budget(self) -> int:
        """How many tokens of prefill the next turn may have."""
        if self._clock() - self._last_decode > self._quiet_s or not self._token_s:
            return self._max_tokens
        return min(self._max_tokens, max(16, int(self._target_s / self._token_s)))

    def ran(self, *, prefill: int, decode: int, seconds: float) -> None:
        """A turn of that many tokens took ``seconds``."""
        if decode:
            self._last_decode = self._clock()
        if prefill >= 16:  # fewer cost what reading the weights costs, which says nothing about longer ones
            measured = seconds / (prefill + decode)
            self._token_s = measured if not self._token_s else 0.7 * self._token_s + 0.3 * measured
