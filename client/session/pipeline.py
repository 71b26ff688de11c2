"""Steps under way along the hops of a route: sent to a hop, pushed from hop to hop, waited for."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from swarm.errors import PeerLostError, RemoteError, SwarmError

from ..routing.pulse import watched
from ..routing.step_times import UNKNOWN_SECONDS, StepTimes
from ..settings import ClientSettings
from .protocols import HopLike

logger = logging.getLogger(__name__)

H = TypeVar("H", bound=HopLike)
_LARGE_BYTES = 2**15  # of a message; smaller ones find room in the buffers on the way


@dataclass(eq=False)
class Chunk:
    """A step under way.

    Attributes:
        alone: the only one under way in its session.
        names: of the pages that it completes, see :mod:`swarm.client.session.prefix`.
        covered: hops that have it, or get it pushed for sure.
    """

    start: int
    hidden: torch.Tensor
    hypo_ids: torch.Tensor | None
    alone: bool
    names: list[bytes] | None
    step_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    covered: set[HopLike] = field(default_factory=set)


class Pipeline(Generic[H]):
    """The hops of a session and the chunks that go through them.

    Args:
        worth: whether a hop that is overdue is worth waiting for.
        times: how long steps usually take.

    Attributes:
        hops: along the route; whoever repairs it puts others in their place.
        sharing: whether the chunks' names say truly what the hops hold.
    """

    def __init__(self, settings: ClientSettings, worth: Callable[[H], Awaitable[bool]], times: StepTimes) -> None:
        self._settings, self._worth, self._times = settings, worth, times
        self._in_flight: dict[str, Chunk] = {}
        self._resending: set[asyncio.Task[None]] = set()
        self.hops: list[H] = []
        self.sharing = False

    @property
    def columns(self) -> int:
        """Of the largest chunk under way; 1 if there is none."""
        return max((chunk.hidden.shape[1] for chunk in self._in_flight.values()), default=1)

    async def begin(self, chunks: Sequence[Chunk]) -> None:
        """Sends all chunks to the first hop: the next hop works on one while this one works on the next."""
        self._in_flight = {chunk.step_id: chunk for chunk in chunks}
        for chunk in chunks:
            try:
                await self.send(0, chunk, chunk.hidden)
            except SwarmError:
                return  # found out again, and repaired, when the chunk is collected

    def end(self, chunks: Sequence[Chunk]) -> None:
        """Lets go of the answers to ``chunks``."""
        for chunk in chunks:
            for hop in self.hops:
                hop.forget(chunk.step_id)
        self._in_flight = {}

    def uncover(self, hops: Sequence[H]) -> None:
        """Nobody is sure to push what is under way to these hops any more."""
        for chunk in self._in_flight.values():
            chunk.covered.difference_update(hops)

    def abandon(self) -> None:
        """Drops the connections to all hops."""
        for hop in self.hops:
            hop.abandon()
        self.hops = []

    async def close(self) -> None:
        """Ends the session at all hops."""
        for task in self._resending:
            task.cancel()
        hops, self.hops = self.hops, []
        await asyncio.gather(*(hop.close() for hop in hops))

    async def send(self, index: int, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Sends a chunk to a hop unless it has it or gets it pushed; the hops behind it get it pushed from there."""
        hop, following = self.hops[index], self._pushed_from(index, chunk)
        if hop in chunk.covered or hop.has_answered(chunk.step_id):
            return
        for behind in following:
            behind.expect(chunk.step_id)
        await self._pass(hop, chunk, hidden, following)
        # A push to a Petals server may be lost, and nobody hears of it: it is sent the step from here too, as its own
        # client does, and runs the one that comes first.
        chunk.covered.update((hop, *(behind for behind in following if not behind.is_petals)))

    async def wait(self, index: int, chunk: Chunk, hidden: torch.Tensor) -> torch.Tensor:
        """A hop's output for a chunk, which it is sent again if it is silent: a push may have been lost."""
        hop, following = self.hops[index], self._pushed_from(index, chunk)
        hop.expect(chunk.step_id)

        async def again() -> None:  # a node runs a step that it gets twice only once
            await self._pass(hop, chunk, hidden, following)

        output = await self.answer(hop, chunk.step_id, hidden, again)
        if output.shape[1] != chunk.hidden.shape[1]:
            raise RemoteError(f"{hop.peer_id} answered for {output.shape[1]} tokens, not {chunk.hidden.shape[1]}")
        return output

    async def answer(
        self, hop: H, step_id: str, hidden: torch.Tensor, again: Callable[[], Awaitable[None]] | None = None
    ) -> torch.Tensor:
        """A hop's answer to a step with ``hidden``. A hop that is overdue is asked whether it lives; if it still has
        not answered after ``silence`` seconds, ``again`` is called, once."""
        loop = asyncio.get_running_loop()
        began, tokens = loop.time(), hidden.shape[0] * hidden.shape[1]
        patience = min(self._settings.silence, self._times.overdue_after(hop.peer_id, tokens))
        output = await hop.reply(step_id, patience)
        if output is None:

            async def worth() -> bool:
                nonlocal again
                if not await self._worth(hop):
                    return False
                if again is not None and loop.time() > began + self._settings.silence:
                    resend, again = again, None
                    await resend()
                return True

            output = await watched(hop.reply(step_id, self._settings.step_timeout), hop.peer_id, 0.0, worth)
        if output is None:
            raise PeerLostError(f"{hop.peer_id} has not done a step in {self._settings.step_timeout:.0f} s")
        self._times.add(hop.peer_id, tokens, loop.time() - began)
        return output

    async def pass_to(
        self,
        hop: H,
        step_id: str,
        start: int,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None = None,
        following: Sequence[H] = (),
        names: list[bytes] | None = None,
    ) -> None:
        """Sends a step to a hop. A frozen one takes a large message no more than it answers."""
        sending = hop.send(step_id, start, hidden, hypo_ids, following, names)
        if hidden.nbytes < _LARGE_BYTES:
            await sending
        else:
            await watched(sending, hop.peer_id, UNKNOWN_SECONDS, lambda: self._worth(hop))

    def push_failed(self, hop: H, step_id: str) -> None:
        """A hop could not push a chunk to the next: send it from here."""
        chunk = self._in_flight.get(step_id)
        if chunk is None or hop not in self.hops:
            return
        task = asyncio.get_running_loop().create_task(self._forward_for(hop, chunk))
        self._resending.add(task)
        task.add_done_callback(self._resending.discard)

    async def _forward_for(self, hop: H, chunk: Chunk) -> None:
        try:
            output = await hop.reply(chunk.step_id, self._settings.step_timeout)
            index = self.hops.index(hop) + 1
            if output is None or index == len(self.hops):
                return
            behind = self.hops[index]
            # one that has taken the place of the hop that it was pushed to gets its steps in order, from the collector
            if behind in chunk.covered and not behind.is_petals:
                await self._pass(behind, chunk, output, self._pushed_from(index, chunk))
        except (SwarmError, ValueError) as error:
            logger.debug("could not forward for %s: %s", hop.peer_id, error)  # the collector finds the hop failed

    async def _pass(self, hop: H, chunk: Chunk, hidden: torch.Tensor, following: Sequence[H]) -> None:
        names = chunk.names if self.sharing else None
        await self.pass_to(hop, chunk.step_id, chunk.start, hidden, chunk.hypo_ids, following, names)

    def _pushed_from(self, index: int, chunk: Chunk) -> list[H]:
        """The hops that get a chunk pushed when it is sent to hop ``index``.

        None behind a Petals server, which passes nothing on. Nor a Petals server while there are more chunks: it takes
        steps as they come, and pushes may overtake each other.
        """
        pushed: list[H] = []
        before = self.hops[index]
        for hop in self.hops[index + 1 :]:
            if before.is_petals or (hop.is_petals and not chunk.alone):
                break
            pushed.append(hop)
            before = hop
        return pushed
