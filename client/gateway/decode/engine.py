"""The decode loop: many sessions, one computation of the ends for all that are back from the swarm.

Each turn takes the sessions whose step has come back, runs final norm and head over them as one batch, samples,
embeds the next tokens, and sends the next steps on their way before anybody is told of the tokens. To decide anew at
every token who is in the batch is an idea of Orca's (Yu et al., OSDI 2022). Here it only concerns the ends: nodes do
the same for the blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...ends.model_ends import ModelEnds
from ...session.route_session import RouteSession
from ...session.swarm_connection import SwarmConnection
from ...session.trace import RouteEvent
from .admission import Admission
from .generation import Generation, Job, Sampled, Scored, Timing, TokenLogprobs
from .sampling import Row, SamplingParams, sample, top_logprobs
from .scoring import score_prompt

logger = logging.getLogger(__name__)
T = TypeVar("T")
_ANY = Row(SamplingParams(temperature=0))
MAX_BATCH = 64
_LEAST_GATHER_SECONDS = 0.002
_MOST_GATHER_SECONDS = 0.02
_LOOKS = 4  # during a wait


class GatewayEngine:
    """Runs jobs of one model. Lives in the client runtime's event loop.

    Args:
        on_batch: is told of the rows of each batch.
    """

    def __init__(
        self, ends: ModelEnds, connection: SwarmConnection, admission: Admission, on_batch: Callable[[int], None]
    ) -> None:
        self._ends, self._connection, self._admission = ends, connection, admission
        self._on_batch = on_batch
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="gateway-torch")
        self._arrived: list[Generation] = []
        self._turn_seconds = _LEAST_GATHER_SECONDS  # recently
        self._decoding = 0  # generations whose one-token step is under way
        self._wake = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to work."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends all that is under way."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        if self._background:
            await asyncio.wait(set(self._background), timeout=3.0)
        self._torch.shutdown(wait=False)

    def check_room(self, sessions: int) -> None:
        """See :meth:`swarm.client.gateway.decode.admission.Admission.check`."""
        self._admission.check(sessions)

    async def compute(self, function: partial[T]) -> T:
        """Runs ``function`` in the thread that all torch work is done in."""
        return await asyncio.get_running_loop().run_in_executor(self._torch, function)

    async def embed_texts(
        self, prompts: list[tuple[int, ...]], route: list[str], adapter: str | None = None
    ) -> list[Tensor]:
        """The mean of the last hidden states of each prompt, of length one: ``[H]`` float32 each.

        ``route`` as for :meth:`generate`.
        """
        embedding = [asyncio.ensure_future(self._embed_text(prompt, route, adapter)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*embedding))
        finally:
            for task in embedding:  # if one failed, the others are of no use
                task.cancel()

    async def generate(
        self, job: Job, timing: Timing, route: list[str]
    ) -> AsyncGenerator[Sampled | Scored | RouteEvent, None]:
        """The tokens of ``job`` as they come. If it asks for it, before them what the model makes of the prompt, and in
        between what happens to its route.

        Closing the iterator ends the session at every hop.

        Args:
            timing: filled in.
            route: filled in with the hops' descriptions, once they are known.

        Raises:
            SwarmError: the swarm failed for longer than the client's settings let it.
        """
        await self._admission.acquire()
        generation: Generation | None = None
        try:
            timing.started = time.monotonic()
            max_length = len(job.prompt) + job.max_tokens
            session = self._connection.route_session(max_length=max_length, adapter=job.adapter)
            generation = Generation(job, session, timing)
            hidden = await self.compute(partial(self._embed_prompt, job.prompt))
            self._send(generation, hidden, decoding=False)
            prefill = generation.step if job.score_prompt else None
            while True:
                result = await generation.results.get()
                if isinstance(result, BaseException):
                    raise result
                _describe(session, route)
                if prefill is not None and isinstance(result, Sampled):
                    yield await score_prompt(
                        self._ends, self.compute, job.prompt, prefill.result(), job.top_logprobs or 0
                    )
                    prefill = None
                yield result
                if isinstance(result, Sampled) and result.finish is not None:
                    return
        finally:
            # not awaited here: whoever leaves may be in the middle of being cancelled
            if generation is not None:
                generation.closed = True
                self._in_background(self._end(generation.session, generation.step))
            else:
                self._admission.release()

    async def _embed_text(self, prompt: tuple[int, ...], route: list[str], adapter: str | None) -> Tensor:
        await self._admission.acquire()
        session: RouteSession | None = None
        try:
            session = self._connection.route_session(max_length=len(prompt), adapter=adapter)
            hidden = await self.compute(partial(self._embed_prompt, prompt))
            output = await session.step(hidden, None, None)
            _describe(session, route)
            return await self.compute(partial(self._pool, output))
        finally:
            if session is not None:
                self._in_background(self._end(session, None))
            else:
                self._admission.release()

    async def _end(self, session: RouteSession, step: asyncio.Task[Tensor] | None) -> None:
        try:
            if step is not None:
                step.cancel()
                await asyncio.wait({step})
            await session.close()
        finally:
            self._admission.release()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # the loop

    def _send(self, generation: Generation, hidden: Tensor, *, decoding: bool) -> None:
        generation.decoding = decoding
        self._decoding += decoding
        generation.step = asyncio.get_running_loop().create_task(generation.session.step(hidden, None, None))
        generation.step.add_done_callback(lambda step: self._arrive(generation, step))

    def _arrive(self, generation: Generation, step: asyncio.Task[Tensor]) -> None:
        self._decoding -= generation.decoding
        generation.back_at = time.monotonic()
        if step.cancelled():
            generation.results.put_nowait(asyncio.CancelledError())
        elif (error := step.exception()) is not None:
            generation.results.put_nowait(error)
        else:
            self._arrived.append(generation)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await self._gather()
            self._wake.clear()
            while self._arrived:
                batch, self._arrived = self._arrived[:MAX_BATCH], self._arrived[MAX_BATCH:]
                await self._turn(batch)

    async def _gather(self) -> None:
        """Waits for sessions that nodes computed together, as their answers come one right after the other.

        As long as a turn takes, but no longer than they keep coming: a turn for each of two would take twice that.
        """
        loop = asyncio.get_running_loop()
        begin, here = loop.time(), -1
        while here != len(self._arrived) < MAX_BATCH and self._decoding and loop.time() < begin + self._turn_seconds:
            here = len(self._arrived)
            await asyncio.sleep(self._turn_seconds / _LOOKS)

    async def _turn(self, batch: list[Generation]) -> None:
        batch = [generation for generation in batch if not generation.closed]
        if not batch:
            return
        begin = time.monotonic()
        hidden = [generation.step.result()[:, -1] for generation in batch if generation.step is not None]
        try:
            results, embedded = await self.compute(partial(self._compute, batch, hidden))
        except Exception as error:
            logger.exception("a batch failed")
            for generation in batch:
                generation.results.put_nowait(error)
            return
        self._on_batch(len(batch))
        now = time.monotonic()
        usual = 0.9 * self._turn_seconds + 0.1 * (now - begin)
        self._turn_seconds = min(max(usual, _LEAST_GATHER_SECONDS), _MOST_GATHER_SECONDS)
        for index, (generation, result) in enumerate(zip(batch, results, strict=True)):
            generation.timing.first = generation.timing.first or now
            generation.timing.last = now
            if isinstance(result, Sampled) and generation.job.trace:  # before the next step puts its own times there
                times = generation.session.times
                results[index] = result = replace(result, times=times, gateway_s=now - generation.back_at)
            if isinstance(result, Sampled) and result.finish is None and not generation.closed:
                self._send(generation, embedded[index : index + 1], decoding=True)
        await asyncio.sleep(0)  # the steps go out first
        for generation, result in zip(batch, results, strict=True):
            generation.results.put_nowait(result)

    # in the torch thread

    def _embed_prompt(self, prompt: tuple[int, ...]) -> Tensor:
        return self._ends.embed(torch.tensor([prompt]), torch.arange(len(prompt))[None])

    def _pool(self, hidden: Tensor) -> Tensor:
        mean = self._ends.norm(hidden)[0].mean(dim=0)
        return torch.nn.functional.normalize(mean, dim=0)

    @torch.inference_mode()
    def _compute(self, batch: list[Generation], hidden: list[Tensor]) -> tuple[list[Sampled | Exception], Tensor]:
        """A token for each, and the embeddings of all tokens ``[rows, 1, H]``.

        A grammar may fail, by a schema that is too much for it. That is the end of its own text alone.
        """
        logits = self._ends.logits(torch.cat(hidden))
        rows = [_attempt(generation.row) for generation in batch]
        chosen = sample(logits, [_ANY if isinstance(row, Exception) else row for row in rows])
        told = self._logprobs(batch, logits, chosen)
        tokens = chosen.tolist()
        results: list[Sampled | Exception] = [
            row if isinstance(row, Exception) else _attempt(partial(each.take, token, told.get(at)))
            for at, (each, row, token) in enumerate(zip(batch, rows, tokens, strict=True))
        ]
        positions = torch.tensor([[len(each.job.prompt) + len(each.tokens) - 1] for each in batch])
        return results, self._ends.embed(chosen[:, None], positions)

    @staticmethod
    def _logprobs(batch: list[Generation], logits: Tensor, chosen: Tensor) -> dict[int, TokenLogprobs]:
        wanted = ((index, each.job.top_logprobs) for index, each in enumerate(batch))
        asking = [(index, count) for index, count in wanted if count is not None]
        if not asking:
            return {}
        rows = [index for index, _ in asking]
        most = min(max(count for _, count in asking), logits.shape[-1])
        own, ids, values = (part.tolist() for part in top_logprobs(logits[rows], chosen[rows], most))
        return {
            index: TokenLogprobs(own[at], tuple(zip(ids[at][:count], values[at][:count], strict=True)))
            for at, (index, count) in enumerate(asking)
        }


def _attempt(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _describe(session: RouteSession, route: list[str]) -> None:
    if not route:
        route += [f"{hop.peer_id}[{hop.start}:{hop.end}]" for hop in session.hops]
