"""Limits per key and minute, counted in a sliding window."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

from ..errors import too_many
from .keys import Key

WINDOW_SECONDS = 60.0


class Window:
    """What was used in the last minute."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, int]] = deque()
        self.total = 0

    def add(self, now: float, amount: int) -> None:
        """Notes a use."""
        self._entries.append((now, amount))
        self.total += amount

    def wait(self, now: float, limit: int) -> float:
        """Seconds until less than ``limit`` are in the window; 0 if that is so."""
        while self._entries and self._entries[0][0] <= now - WINDOW_SECONDS:
            self.total -= self._entries.popleft()[1]
        left = self.total
        for since, amount in self._entries:
            if left < limit:
                break
            left -= amount
            if left < limit:
                return since + WINDOW_SECONDS - now
        return 0.0


class RateLimits:
    """The windows of all keys. A request is let in as long as its key is below its limits; tokens count when they are
    known, so the last one let in may go beyond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: defaultdict[str, Window] = defaultdict(Window)
        self._tokens: defaultdict[str, Window] = defaultdict(Window)

    def admit(self, key: Key) -> None:
        """Lets a request in, and counts it.

        Raises:
            ApiError: 429, with the time after which there is room again.
        """
        now = self._clock()
        for what, windows, limit in (
            ("requests", self._requests, key.requests_per_minute),
            ("tokens", self._tokens, key.tokens_per_minute),
        ):
            if limit is not None and (wait := windows[key.name].wait(now, limit)) > 0:
                raise too_many(
                    f"key {key.name!r} has used its {limit} {what} per minute: try again in {wait:.0f} s",
                    "rate_limit_exceeded",
                    wait,
                )
        self._requests[key.name].add(now, 1)

    def used(self, name: str, tokens: int) -> None:
        """Counts tokens of a key."""
        self._tokens[name].add(self._clock(), tokens)
