"""One request to the API: what is counted, timed and logged of it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ..decode.generation import Timing


@dataclass(eq=False)
class Call:
    """A request under way.

    Attributes:
        key: name of the API key, if keys are asked for.
        timings: of its sessions.
        route: the hops of its first session, ``peer[start:end]``.
        size: bytes of the request.
        prompt, answer: texts, kept only where they are to be logged.
    """

    endpoint: str
    key: str | None = None
    model: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    begin: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    timings: list[Timing] = field(default_factory=list)
    route: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt: Any = None
    size: int = 0

    @property
    def queue_seconds(self) -> float:
        """How long its first session to start waited for its turn."""
        return min((t.started - t.asked for t in self.timings if t.started is not None), default=0.0)

    @property
    def first_seconds(self) -> float | None:
        """From the request to the first token."""
        first = min((t.first for t in self.timings if t.first is not None), default=None)
        return None if first is None else first - self.begin

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first of each session, over the time that they took."""
        first = min((t.first for t in self.timings if t.first is not None), default=None)
        last = max((t.last for t in self.timings if t.last is not None), default=None)
        tokens = self.completion_tokens - len(self.timings)
        if first is None or last is None or last <= first or tokens <= 0:
            return None
        return tokens / (last - first)

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``, and times beside it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            **self.times(),
        }

    def times(self) -> dict[str, Any]:
        """Seconds in the queue and to the first token, and tokens per second; None where nothing was generated."""
        return {
            "queue_seconds": round(self.queue_seconds, 4),
            "first_token_seconds": _rounded(self.first_seconds),
            "tokens_per_second": _rounded(self.tokens_per_second),
        }

    def route_text(self) -> str:
        """For the header ``x-swarm-route``, which is ASCII."""
        return " -> ".join(self.route)


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
