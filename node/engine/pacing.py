"""How long a prefill may hold up the sessions that decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

_SHORTEST = 8  # tokens of a piece of prefill


class Pacer:
    """Measures what prefill and decode cost, and sizes pieces of prefill so that one costs those who decode at most
    ``share`` of a decode step more, and never more than ``target_s``.

    While nobody decodes, pieces are as large as the batch allows: that is the cheapest way through a prompt.
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

    def prefill_budget(self) -> int:
        """How many tokens of prefill the next turn may have."""
        if self._clock() - self._last_decode > self._quiet_s or not self._token_s:
            return self._max_tokens
        target = min(self._target_s, self._share * self._decode_s) if self._decode_s else self._target_s
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


class Gatherer:
    """Decides how long to wait for sessions that are due, so that those that decode keep decoding together.

    Without it, sessions scatter into ever smaller groups that take turns: the first to come back is computed alone
    while the others, answered with it, are still on their way, and find the engine busy. A batch takes about as long
    for many rows as for one, and sessions that were computed together are answered together and come back together. So
    to wait until some moment costs those that are here, or come until then, their wait, once; and it saves all of them
    a batch, now and in the rounds to come. It is done where it saves more than it costs.
    """

    def __init__(self, *, worth: float = 0.5, reach: float = 1.25) -> None:
        self._worth = worth  # of a batch saved, to each session that is computed together, in batches
        self._reach = reach  # how far to look ahead and to wait at most, in batches
        self._batch_s = 0.0

    def ran(self, seconds: float) -> None:
        """A batch with decode in it took ``seconds``."""
        self._batch_s = seconds if not self._batch_s else 0.7 * self._batch_s + 0.3 * seconds

    def usual(self, before: float | None, seconds: float) -> float:
        """How long a session is usually away, after it has been away for ``seconds``."""
        return seconds if before is None else 0.7 * before + 0.3 * seconds

    def patience_s(self, now: float, waiting: int, waiting_since: float, due: Iterable[float]) -> float:
        """How long to wait now, with ``waiting`` sessions here (the first since ``waiting_since``), for those that are
        ``due`` at these times. 0: don't. Who is overdue may come any moment; late by half a batch, it may be gone."""
        batch, limit = self._batch_s, self._reach * self._batch_s
        soon = now + batch / 4
        near = sorted(moment if moment > now else soon for moment in due if now - batch / 2 < moment < now + limit)
        best, until, total = 0.0, now, 0.0
        for count, moment in enumerate(near, start=1):
            total += moment
            costs = waiting * (moment - now) + count * moment - total
            gain = self._worth * batch * (waiting + count) - costs
            if gain > best:
                best, until = gain, moment
        if not best:
            return 0.0
        # a little longer than to the moment itself, since nobody is on time
        return max(0.0, min(until + batch / 8, waiting_since + limit) - now)
