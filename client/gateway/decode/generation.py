"""One text under way: what was asked for, and what has been sampled so far."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...session.trace import HopTime, RouteEvent
from .sampling import Row, SamplingParams

if TYPE_CHECKING:
    from ...session.route_session import RouteSession


class Grammar(Protocol):
    """What may come next; see :mod:`swarm.client.gateway.text.grammar`."""

    def allowed(self) -> Tensor:
        """``[vocabulary]`` bool."""

    def accept(self, token: int) -> None:
        """``token`` was taken."""

    @property
    def finished(self) -> bool:
        """Nothing can come any more."""


@dataclass(frozen=True)
class Job:
    """A text to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: 0 if nothing but the prompt's log-probabilities is wanted.
        eos: tokens that end it.
        top_logprobs: how many of the likeliest tokens to tell with each; None for no log-probabilities at all.
        score_prompt: whether to tell log-probabilities of the prompt's tokens too.
        adapter: the LoRA adapter that it goes through, if any.
        trace: whether to tell how the route changes, and how long each hop took for each token.
        seed: the same seed gives the same text, whatever else the gateway does.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    seed: int
    eos: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    score_prompt: bool = False
    grammar: Grammar | None = None
    adapter: str | None = None
    trace: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, and the likeliest ones'. The first token of a prompt has none."""

    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Scored:
    """What the model makes of each token of the prompt, knowing those before it."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Sampled:
    """A token. ``finish`` is why it is the last one.

    ``end``: it says that the text ends, and is no part of it; ``complete``: the grammar lets nothing follow;
    ``length``: it is as long as asked for; ``empty``: no token was asked for, so it is no part either.
    ``times``: of the step that it came from, if they were asked for, and what the gateway took for it itself.
    """

    token: int
    finish: str | None
    logprobs: TokenLogprobs | None
    times: tuple[HopTime, ...] = ()
    gateway_s: float = 0.0

    @property
    def is_text(self) -> bool:
        """Whether it is a part of the text."""
        return self.finish not in ("end", "empty")


@dataclass
class Timing:
    """When what happened, by ``time.monotonic``."""

    asked: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    last: float | None = None


@dataclass(eq=False)
class Generation:
    """A job's state. Its fields belong to the engine's loop, its methods are called in the torch thread."""

    job: Job
    session: RouteSession
    timing: Timing
    tokens: list[int] = field(default_factory=list)
    results: asyncio.Queue[Sampled | RouteEvent | BaseException] = field(default_factory=asyncio.Queue)
    step: asyncio.Task[Tensor] | None = None
    decoding: bool = False  # the step under way is one token, so it is soon back
    closed: bool = False  # nobody wants more of it
    back_at: float = 0.0  # when the step came back

    def __post_init__(self) -> None:
        if self.job.trace:
            self.session.on_route = self.results.put_nowait
        self._random = torch.Generator().manual_seed(self.job.seed)
        self._counts: Counter[int] = Counter()
        self._seen = set(self.job.prompt)

    def row(self) -> Row:
        """What the sampler is to know."""
        draw = float(torch.rand((), dtype=torch.float64, generator=self._random))
        allowed = None if self.job.grammar is None else self.job.grammar.allowed()
        return Row(self.job.params, self._seen, self._counts, allowed, draw)

    def take(self, token: int, logprobs: TokenLogprobs | None) -> Sampled:
        """Adds the token that was sampled."""
        job = self.job
        if job.max_tokens == 0:
            return Sampled(token, "empty", None)
        if token in job.eos:
            return Sampled(token, "end", logprobs)
        self.tokens.append(token)
        self._counts[token] += 1
        self._seen.add(token)
        if job.grammar is not None:
            job.grammar.accept(token)
            if job.grammar.finished:
                return Sampled(token, "complete", logprobs)
        return Sampled(token, "length" if len(self.tokens) == job.max_tokens else None, logprobs)
