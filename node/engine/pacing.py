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


class Gatherer:
    """Decides how long to wait for sessions that were just answered, so that those that decode keep decoding together.

    Without it, sessions split for good into groups that take turns: one group's next tokens come right after another
    group's batch has begun. Waiting pays if clients are back soon, compared to the time of a batch.
    """

    def __init__(self, *, share: float = 0.25) -> None:
        self._share = share
        self._batch_s = 0.0
        self._return_s = 0.0  # how long clients take to come back, on average

    def patience_s(self) -> float:
        """How long to wait now, at most. 0: don't."""
        limit = self._share * self._batch_s
        return 0.0 if self._return_s > limit else min(limit, 3 * self._return_s + 0.001)

    def ran(self, seconds: float) -> None:
        """A batch with decode in it took ``seconds``."""
        self._batch_s = seconds

    def returned(self, seconds: float) -> None:
        """A client sent its next step ``seconds`` after the result of the last."""
        self._return_s += 0.1 * (seconds - self._return_s)
