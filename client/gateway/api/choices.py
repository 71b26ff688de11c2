"""Jobs to text: the choices of a request, merged as their pieces come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ...session.trace import RouteEvent
from ..decode.generation import Job, Sampled, Scored, Timing, TokenLogprobs
from ..served_model import ServedModel
from ..text.text import NO_ECHO, Detokenizer, Echo, StopStrings
from .call import Call


@dataclass(frozen=True)
class TokenText:
    """A token with its log-probabilities, for those who asked. ``offset``: where in the text it begins."""

    token: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Delta:
    """A piece of a choice. ``finish``, in the last one: ``stop`` or ``length``. ``trace`` is for those who asked."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    finish: str | None = None
    trace: tuple[Sampled | RouteEvent, ...] = ()


@dataclass
class Whole:
    """All pieces of a choice."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish: str = ""

    def add(self, delta: Delta) -> None:
        """One more piece."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish = delta.finish or self.finish


async def run_choice(
    model: ServedModel, job: Job, stops: Sequence[str], call: Call, echo: Echo = NO_ECHO
) -> AsyncGenerator[Delta, None]:
    """The text of one job, behind ``echo``. Pieces are never empty, except the last, and those with a trace."""
    timing = Timing()
    call.timings.append(timing)
    text, stop = Detokenizer(model.tokenizer), StopStrings(stops)
    told: list[TokenText] = []
    lead, length = echo.text, len(echo.text)
    async with aclosing(model.engine.generate(job, timing, call.route)) as tokens:
        async for sampled in tokens:
            if isinstance(sampled, RouteEvent):
                yield Delta("", trace=(sampled,))
                continue
            if isinstance(sampled, Scored):
                told += map(TokenText, job.prompt, sampled.logprobs, echo.offsets)
                continue
            trace = (sampled,) if job.trace else ()
            if sampled.is_text:
                call.completion_tokens += 1
                if sampled.logprobs is not None:
                    told.append(TokenText(sampled.token, sampled.logprobs, length))
            new = _new_text(text, sampled)
            length += len(new)
            piece = stop.push(new)
            shown, lead = lead + piece.text, ""
            if piece.stopped:
                yield Delta(shown, tuple(told), "stop", trace)
                return
            if sampled.finish is not None:
                finish = "length" if sampled.finish in ("length", "empty") else "stop"
                yield Delta(shown + stop.finish(), tuple(told), finish, trace)
                return
            if shown or trace:
                yield Delta(shown, tuple(told), trace=trace)
                told = []


def _new_text(text: Detokenizer, sampled: Sampled) -> str:
    new = text.push(sampled.token) if sampled.is_text else ""
    return new if sampled.finish is None else new + text.finish()


async def merge(choices: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The pieces of all ``choices`` with their numbers, as they come. An error of one ends all."""
    if len(choices) == 1:
        async with aclosing(choices[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, choice: AsyncGenerator[Delta, None]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(choice) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except Exception as error:
            end = error
        queue.put_nowait((index, end))

    tasks = [asyncio.ensure_future(pump(index, choice)) for index, choice in enumerate(choices)]
    left = len(tasks)
    try:
        while left:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def collect(choices: Sequence[AsyncGenerator[Delta, None]]) -> list[Whole]:
    """All choices to their ends."""
    wholes = [Whole() for _ in choices]
    async with aclosing(merge(choices)) as deltas:
        async for index, delta in deltas:
            wholes[index].add(delta)
    return wholes
