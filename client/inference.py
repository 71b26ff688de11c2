"""A session along a route: steps go in at the first hop and come out at the last, whatever happens to the hops."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from swarm import rpc
from swarm.client.hop import Hop
from swarm.client.settings import ClientSettings
from swarm.client.swarm_view import SwarmView
from swarm.errors import BadRequestError, OutOfCacheError, PeerLostError, RemoteError, SwarmError

logger = logging.getLogger(__name__)
_FULL_RETRY_SECONDS = 0.5
_ALIVE_TIMEOUT = 5.0


@dataclass(eq=False)
class _Chunk:
    """A step under way.

    Attributes:
        alone: the only one under way in its session.
        covered: hops that have it, or get it pushed for sure.
    """

    start: int
    hidden: torch.Tensor
    hypo_ids: torch.Tensor | None
    alone: bool
    step_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    covered: set[Hop] = field(default_factory=set)


class Inference:
    """The asynchronous side of :class:`swarm.client.session.Session`.

    When a hop fails, other nodes take over just its blocks: what was sent to the hop is sent to them again as one
    prefill, and the step that failed goes on from there. The hops before and after keep their caches.
    """

    def __init__(
        self, view: SwarmView, settings: ClientSettings, *, first: int, last: int, max_length: int, hidden_size: int
    ) -> None:
        self._view, self._settings = view, settings
        self._first, self._last = first, last
        self._max_length, self._hidden_size = max_length, hidden_size
        self._rows = 0
        self._left_padding: tuple[int, ...] = ()
        self._in_flight: dict[str, _Chunk] = {}
        self._resending: set[asyncio.Task[None]] = set()
        self._broken = False
        self.hops: list[Hop] = []
        self.position = 0

    async def step(
        self, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, left_padding: Sequence[int] | None
    ) -> torch.Tensor:
        """Runs ``hidden`` ``[rows, T, H]`` through all hops. An error ends the session."""
        if self._broken:
            raise RemoteError("the session has ended with an error: open a new one")
        rows, columns, _ = hidden.shape
        if not self.hops:
            self._rows, self._left_padding = rows, tuple(left_padding or ())
            self.hops = await self._open_route(self._first, self._last, self._left_padding)
        width = self._width()
        chunks = [
            _Chunk(self.position + at, hidden[:, at : at + width], hypo_ids if at == 0 else None, columns <= width)
            for at in range(0, columns, width)
        ]
        try:
            await self._replace_cropped()
            self._in_flight = {chunk.step_id: chunk for chunk in chunks}
            for chunk in chunks:  # all of them at once: the next hop works on one while this one works on the next
                await self._send(0, chunk, chunk.hidden, must=False)
            outputs = [await self._collect(chunk) for chunk in chunks]
        except BaseException:
            self._broken = True  # some hops may have reordered their rows already
            raise
        finally:
            for chunk in chunks:
                for hop in self.hops:
                    hop.forget(chunk.step_id)
            self._in_flight = {}
        self.position += columns
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _width(self) -> int:
        """Columns of a step at most."""
        return max(1, self._settings.prefill_tokens // self._rows)

    def crop(self, position: int) -> None:
        """Forgets the columns from ``position`` on: the nodes are told by the next step's start."""
        for hop in self.hops:
            hop.history.crop(position)
            hop.cropped |= hop.is_petals and position < self.position
        self.position = position

    async def close(self) -> None:
        """Ends the session at all hops."""
        for task in self._resending:
            task.cancel()
        hops, self.hops = self.hops, []
        await asyncio.gather(*(hop.close() for hop in hops))

    async def _collect(self, chunk: _Chunk) -> torch.Tensor:
        """Follows a chunk from hop to hop; keeps each hop's input; repairs what fails."""
        hidden, index = chunk.hidden, 0
        while index < len(self.hops):
            hop = self.hops[index]
            try:
                await self._send(index, chunk, hidden, must=True)
                output = await self._wait(index, chunk, hidden)
            except SwarmError as error:
                await self._replace(index, error)
                continue
            self._view.succeeded(hop.peer_id)
            hop.history.append(chunk.start, hidden, chunk.hypo_ids)
            hidden, index = output, index + 1
        return hidden

    async def _send(self, index: int, chunk: _Chunk, hidden: torch.Tensor, *, must: bool) -> None:
        """Sends a chunk to a hop unless it has it or gets it pushed; the hops behind it get it pushed from there."""
        hop, following = self.hops[index], self._pushed_from(index, chunk)
        if hop in chunk.covered or hop.has_answered(chunk.step_id):
            return
        for behind in following:
            behind.expect(chunk.step_id)
        try:
            await hop.send(chunk.step_id, chunk.start, hidden, chunk.hypo_ids, following)
        except SwarmError:
            if must:
                raise
            return  # found out, and repaired, when the chunk is collected
        # A push to a Petals server may be lost, and nobody hears of it: it is sent the step from here too, as its own
        # client does, and runs the one that comes first.
        chunk.covered.update((hop, *(behind for behind in following if not behind.is_petals)))

    def _pushed_from(self, index: int, chunk: _Chunk) -> list[Hop]:
        """The hops that get a chunk pushed when it is sent to hop ``index``.

        None behind a Petals server, which passes nothing on. Nor a Petals server while there are more chunks: it takes
        steps as they come, and pushes may overtake each other.
        """
        pushed: list[Hop] = []
        before = self.hops[index]
        for hop in self.hops[index + 1 :]:
            if before.is_petals or (hop.is_petals and not chunk.alone):
                break
            pushed.append(hop)
            before = hop
        return pushed

    async def _wait(self, index: int, chunk: _Chunk, hidden: torch.Tensor) -> torch.Tensor:
        """A hop's output for a chunk, which it is sent again if it is silent: a push may have been lost."""
        hop, following = self.hops[index], self._pushed_from(index, chunk)
        hop.expect(chunk.step_id)

        async def again() -> None:  # a node runs a step that it gets twice only once
            await hop.send(chunk.step_id, chunk.start, hidden, chunk.hypo_ids, following)

        output = await self._answer(hop, chunk.step_id, again)
        if output.shape[1] != chunk.hidden.shape[1]:
            raise RemoteError(f"{hop.peer_id} answered for {output.shape[1]} tokens, not {chunk.hidden.shape[1]}")
        return output

    async def _answer(self, hop: Hop, step_id: str, again: Callable[[], Awaitable[None]] | None = None) -> torch.Tensor:
        """A hop's answer to a step. A silent hop is asked whether it lives; if so, ``again`` is called, once."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.step_timeout
        while (output := await hop.reply(step_id, self._settings.silence)) is None:
            if loop.time() > deadline or not await self._alive(hop):
                raise PeerLostError(f"{hop.peer_id} does not answer")
            if again is not None:
                await again()
                again = None
        return output

    async def _alive(self, hop: Hop) -> bool:
        call = self._view.peer.p2p.call_protobuf_handler(
            hop.peer_id, rpc.handle_name(rpc.INFO), runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo
        )
        try:
            await asyncio.wait_for(call, _ALIVE_TIMEOUT)
        except Exception:
            return False
        return True

    def _push_failed(self, hop: Hop, step_id: str) -> None:
        """A hop could not push a chunk to the next: send it from here."""
        chunk = self._in_flight.get(step_id)
        if chunk is None or hop not in self.hops:
            return
        task = asyncio.get_running_loop().create_task(self._forward_for(hop, chunk))
        self._resending.add(task)
        task.add_done_callback(self._resending.discard)

    async def _forward_for(self, hop: Hop, chunk: _Chunk) -> None:
        try:
            output = await hop.reply(chunk.step_id, self._settings.step_timeout)
            index = self.hops.index(hop) + 1
            if output is not None and index < len(self.hops) and not self.hops[index].is_petals:
                following = self._pushed_from(index, chunk)
                await self.hops[index].send(chunk.step_id, chunk.start, output, chunk.hypo_ids, following)
        except (SwarmError, ValueError) as error:
            logger.debug("could not forward for %s: %s", hop.peer_id, error)  # the collector finds the hop failed

    # opening and replacing hops

    async def _replace(self, index: int, error: SwarmError) -> None:
        """Puts other hops in the place of one that failed, with its history played back."""
        failed = self.hops[index]
        self._note(failed.peer_id, error)
        logger.warning("Blocks %d:%d: %s; finding another way…", failed.start, failed.end, error)
        failed.abandon()
        await self._renew(index)

    async def _replace_cropped(self) -> None:
        """Opens new sessions at hops that were to forget columns and can't."""
        for hop in [hop for hop in self.hops if hop.cropped]:
            await hop.close()
            await self._renew(self.hops.index(hop))

    async def _renew(self, index: int) -> None:
        failed = self.hops[index]
        deadline = asyncio.get_running_loop().time() + self._settings.wait_timeout
        while True:
            try:
                replacement = await self._replay(failed)
                break
            except OutOfCacheError as full:
                if asyncio.get_running_loop().time() > deadline:
                    raise full
                await asyncio.sleep(_FULL_RETRY_SECONDS)
        self.hops[index : index + 1] = replacement

    async def _replay(self, failed: Hop) -> list[Hop]:
        rows = self._rows
        refused = 0
        while True:
            hidden, order = failed.history.replay(rows)
            padding = self._left_padding and tuple(self._left_padding[row] for row in order.tolist())
            hops = await self._open_route(failed.start, failed.end, padding)
            hop = hops[0]
            try:
                if hidden is not None:
                    for hop in hops:
                        hidden = await self._refill(hop, hidden)
                return hops
            except SwarmError as error:
                self._note(hop.peer_id, error)
                for opened in hops:
                    opened.abandon()
                refused += isinstance(error, BadRequestError)
                if isinstance(error, OutOfCacheError) or refused > 1:
                    raise

    async def _refill(self, hop: Hop, hidden: torch.Tensor) -> torch.Tensor:
        """Plays ``hidden`` into a new hop; its outputs."""
        width = self._width()
        outputs = []
        for at in range(0, hidden.shape[1], width):
            step_id, part = uuid.uuid4().hex, hidden[:, at : at + width]
            await hop.send(step_id, at, part, None, ())
            outputs.append(await self._answer(hop, step_id))
            hop.forget(step_id)
        hop.history.append(0, hidden, None)
        return torch.cat(outputs, dim=1)

    async def _open_route(self, first: int, last: int, left_padding: Sequence[int]) -> list[Hop]:
        """Opens a session at each hop of the best route; looks for another route while one of them fails.

        Raises:
            MissingBlocksError: there is no route within the time to wait.
            OutOfCacheError: every node that could be asked is full.
            BadRequestError: two nodes refused the session.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.wait_timeout
        refused = 0
        while True:
            legs = await self._view.route(
                first, last, cache_tokens=self._rows * self._max_length, left_padding=any(left_padding)
            )
            opening = [asyncio.ensure_future(self._open(leg, left_padding)) for leg in legs]
            try:
                opened = await asyncio.gather(*opening, return_exceptions=True)
            except asyncio.CancelledError:
                for task in opening:  # nobody else knows those that are open by now
                    task.add_done_callback(_abandon)
                raise
            errors = [
                (leg, result) for leg, result in zip(legs, opened, strict=True) if isinstance(result, BaseException)
            ]
            hops = [result for result in opened if isinstance(result, Hop)]
            if not errors:
                return hops
            for hop in hops:
                hop.abandon()
            for leg, error in errors:
                if not isinstance(error, SwarmError):
                    raise error
                self._note(leg.peer_id, error)
                refused += isinstance(error, BadRequestError)
                logger.info("Blocks %d:%d: %s", leg.start, leg.end, error)
            fatal = next((error for _, error in errors if isinstance(error, BadRequestError)), None)
            if fatal is not None and refused > 1:
                raise fatal
            full = next((error for _, error in errors if isinstance(error, OutOfCacheError)), None)
            if full is not None:
                if asyncio.get_running_loop().time() > deadline:
                    raise full
                await asyncio.sleep(_FULL_RETRY_SECONDS)

    async def _open(self, leg: Any, left_padding: Sequence[int]) -> Hop:
        hop = await Hop.open(
            self._view.peer.p2p,
            leg,
            self._view.prefix,
            rows=self._rows,
            hidden_size=self._hidden_size,
            max_length=self._max_length,
            left_padding=left_padding,
            max_bytes=4 * self._hidden_size * (self._settings.prefill_tokens + self._rows) + 2**20,
            timeout=self._settings.connect_timeout,
        )
        hop.on_push_failed = lambda step_id: self._push_failed(hop, step_id)
        return hop

    def _note(self, peer_id: Any, error: SwarmError) -> None:
        if isinstance(error, OutOfCacheError):
            self._view.full(peer_id)
        else:
            self._view.failed(peer_id)


def _abandon(opening: asyncio.Future[Hop]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abandon()
