"""How long a prefill may hold up the sessions that decode."""

from __future__ import annotations

import time
from collections.abc import Callable

_SHORTEST = 8  # tokens of a piece of prefill


class Pacer:
    """Measures what prefill and decode cost, and sizes pieces of prefill so that one costs those who decode at most
    ``share`` of a decode step more, and never more than ``target_s``.

    While nobody decodes, pieces are as large as the batch allows: that is the cheapest way through a prompt. Where more
    wait for their prompts than decode, pieces are as many times larger: it is they whom a small piece holds up.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        target_s: float = 0.25,
        share: float = 0.8,
        quiet_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_tokens = max_tokens
        self._target_s = target_s
        self._share = share
        self._quiet_s = quiet_s
        self._clock = clock
        self._token_s = 0.0  # of prefill
        self._decode_s = 0.0  # a turn in which there is only decode
        self._last_decode = float("-inf")

    def prefill_budget(self, *, prefilling: int = 1, decoding: int = 1) -> int:
        """How many tokens of prefill the next turn may have, if so many sessions wait for the one and the other."""
        if not decoding or self._clock() - self._last_decode > self._quiet_s or not self._token_s:
            return self._max_tokens
        share = self._share * max(1.0, prefilling / max(1, decoding))
        target = min(self._target_s, share * self._decode_s) if self._decode_s else self._target_s
        return min(self._max_tokens, max(_SHORTEST, int(target / self._token_s)))

    def ran(self, *, prefill: int, decode: int, seconds: float) -> None:
        """A turn of that many tokens took ``seconds``."""
        if decode:
            self._last_decode = self._clock()
            if not prefill:
                self._decode_s = _mixed(self._decode_s, seconds)
        if prefill >= _SHORTEST:  # fewer cost what reading the weights costs, which says nothing about longer ones
            alone = max(seconds - self._decode_s, seconds / 4) if decode else seconds
            self._token_s = _mixed(self._token_s, alone / prefill)


def _mixed(average: float, measured: float) -> float:
    return 0.7 * average + 0.3 * measured if average else measured
