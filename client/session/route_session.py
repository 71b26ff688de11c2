"""A session along a route: steps go in at the first hop and come out at the last, whatever happens to the hops."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.chance import CHANCE
from swarm.errors import OutOfCacheError, PeerLostError, RemoteError, SwarmError
from swarm.wire import rpc

from ..routing.left_out import Needs
from ..routing.route import Leg
from ..routing.swarm_view import SwarmView
from ..settings import ClientSettings
from .failures import Failures
from .history import History
from .hop import Hop
from .opening import open_in_order, open_together
from .prefix import Digests, PageNames, describe_context
from .trace import HopName, HopTime, RouteEvent, split_time

logger = logging.getLogger(__name__)
_FULL_RETRY_SECONDS = 0.5
_ALIVE_TIMEOUT = 5.0


@dataclass(eq=False)
class _Chunk:
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
    covered: set[Hop] = field(default_factory=set)


class _InputsMissing(Exception):
    """A hop has to be replaced that began with columns that it had already: nobody knows what it was sent for them."""


class RouteSession:
    """The asynchronous side of :class:`swarm.client.session.session.Session`.

    When a hop fails, other nodes take over just its blocks: what was sent to the hop is sent to them again as one
    prefill, and the step that failed goes on from there. The hops before and after keep their caches. Behind the first
    hop that can't be done for a session that began with another one's cache. Then all of its hops are opened anew, and
    what was sent to the first one goes through all of them.

    Args:
        salt: what the names of pages are salted with (see :mod:`swarm.client.session.prefix`); None to share no cache.
        adapter: the LoRA adapter that the session goes through, if any.
    """

    def __init__(
        self,
        view: SwarmView,
        settings: ClientSettings,
        *,
        first: int,
        last: int,
        max_length: int,
        hidden_size: int,
        salt: bytes | None = None,
        croppable: bool = True,
        adapter: str | None = None,
    ) -> None:
        self._view, self._settings = view, settings
        self._first, self._last = first, last
        self._max_length, self._hidden_size = max_length, hidden_size
        self._salt, self._adapter = salt, adapter
        self._croppable = croppable
        self._failures = Failures(view, settings)
        self._rows = 0
        self._left_padding: tuple[int, ...] = ()
        self._in_flight: dict[str, _Chunk] = {}
        self._resending: set[asyncio.Task[None]] = set()
        self._inputs = History()
        self._names: PageNames | None = None
        self._before: tuple[int, PageNames | None] | None = None  # the position and the names as the last step began
        self._sharing = False  # whether the names say truly what the hops hold
        self.hops: list[Hop] = []
        self.position = 0
        self.on_route: Callable[[RouteEvent], None] | None = None
        self.times: tuple[HopTime, ...] = ()  # of the last step, if somebody asks for on_route

    async def step(
        self,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None,
        left_padding: Sequence[int] | None,
        *,
        wanted: int | None = None,
        digests: Digests | None = None,
    ) -> torch.Tensor:
        """Runs ``hidden`` ``[rows, T, H]`` through all hops. If it fails or is cancelled, all is as before.

        Args:
            wanted: how many columns at the end the caller will look at; others may be zero. Default: all.
            digests: of the columns of ``hidden``, if the session has a salt.
        """
        rows, columns, _ = hidden.shape
        self._failures = Failures(self._view, self._settings)
        if not self._rows:
            self._rows, self._left_padding = rows, tuple(left_padding or ())
            if self._salt is not None and digests is not None:
                self._names = PageNames(self._left_padding or (0,) * rows)
        self._before = self.position, self._names and self._names.copy()
        if self._names is not None and digests is not None:
            self._names.extend(self.position, digests, hypo_ids)
        self._inputs.append(self.position, hidden, hypo_ids)
        try:
            output = await self._through(hidden, hypo_ids, columns if wanted is None else wanted)
        except BaseException:
            self.take_back()
            raise
        self.position += columns
        skipped = columns - output.shape[1]
        if skipped > 0:
            return torch.cat([output.new_zeros(rows, skipped, output.shape[2]), output], dim=1)
        return output[:, -skipped:] if skipped else output

    async def _through(self, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, wanted: int) -> torch.Tensor:
        """The outputs of the last columns: as many as there are in ``hidden``, or fewer, or more."""
        start = self.position
        while True:
            if not self.hops:
                start, hidden, hypo_ids = *await self._begin(wanted), None
            try:
                return await self._run(start, hidden, hypo_ids)
            except _InputsMissing:
                self._abandon_hops()

    async def _begin(self, wanted: int) -> tuple[int, torch.Tensor]:
        """Opens all hops, with what is in their caches already: the column where to go on, and the inputs from there.

        The inputs are all that the session has had so far, the step that is under way included.
        """
        inputs, order = self._inputs.replay(self._rows)
        assert inputs is not None
        spare = max(0, inputs.shape[1] - wanted)
        padding = self._left_padding and tuple(self._left_padding[row] for row in order.tolist())
        self.hops = await self._open_route(self._first, self._last, padding, sharing=(inputs.dtype, spare))
        self._sharing = self._names is not None
        self._tell("route", self.hops)
        start = min(spare, *(hop.reused for hop in self.hops))
        for hop in self.hops:
            hop.history.skip(start)
        if start:
            self.hops[0].history.append(0, inputs[:, :start], None)
        return start, inputs[:, start:]

    async def _run(self, start: int, hidden: torch.Tensor, hypo_ids: torch.Tensor | None) -> torch.Tensor:
        columns = hidden.shape[1]
        await self._replace_cropped()
        width = self._width(self.hops)
        began = asyncio.get_running_loop().time()
        chunks = [
            _Chunk(
                start + at,
                hidden if columns <= width else hidden[:, at : at + width],
                hypo_ids if at == 0 else None,
                columns <= width,
                self._names.between(start + at, min(start + at + width, start + columns)) if self._names else None,
            )
            for at in range(0, columns, width)
        ]
        try:
            self._in_flight = {chunk.step_id: chunk for chunk in chunks}
            for chunk in chunks:  # all of them at once: the next hop works on one while this one works on the next
                await self._send(0, chunk, chunk.hidden, must=False)
            outputs = []
            for chunk in chunks:
                outputs.append(await self._collect(chunk))
                self._failures.progress(chunk.start)
            if self.on_route is not None:
                self.times = self._times(began, chunks)
        finally:
            for chunk in chunks:
                for hop in self.hops:
                    hop.forget(chunk.step_id)
            self._in_flight = {}
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _times(self, began: float, chunks: Sequence[_Chunk]) -> tuple[HopTime, ...]:
        answers = ((_name(hop), [hop.answered(chunk.step_id) for chunk in chunks]) for hop in self.hops)
        return split_time(began, ((name, [part for part in parts if part is not None]) for name, parts in answers))

    def _tell(self, kind: str, hops: Sequence[Hop], reason: str = "") -> None:
        if self.on_route is not None:
            self.on_route(RouteEvent(kind, tuple(map(_name, hops)), reason))

    def _width(self, hops: Sequence[Hop]) -> int:
        """Columns of a step through ``hops`` at most."""
        tokens = min([self._settings.prefill_tokens, *(hop.limits.tokens for hop in hops)])
        return max(1, tokens // self._rows)

    def crop(self, position: int) -> None:
        """Forgets the columns from ``position`` on: the nodes are told by the next step's start."""
        self._inputs.crop(position)
        for hop in self.hops:
            hop.history.crop(position)
            hop.cropped |= position < self.position and (hop.is_petals or not self._croppable)
        self.position = position

    def take_back(self) -> None:
        """Forgets the last step, with its reordering, as if there had been none. Nobody knows what the hops have of it,
        so they are left; the next step opens others, or the same again, and plays all that was before into them."""
        if self._before is None:
            return
        (self.position, self._names), self._before = self._before, None
        self._inputs.take_back()
        self._abandon_hops()
        if not self.position:
            self._rows, self._names = 0, None

    def _abandon_hops(self) -> None:
        for hop in self.hops:
            hop.abandon()
        self.hops = []

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
            await self._pass(hop, chunk, hidden, following)
        except SwarmError:
            if must:
                raise
            return  # found out, and repaired, when the chunk is collected
        # A push to a Petals server may be lost, and nobody hears of it: it is sent the step from here too, as its own
        # client does, and runs the one that comes first.
        chunk.covered.update((hop, *(behind for behind in following if not behind.is_petals)))

    async def _pass(self, hop: Hop, chunk: _Chunk, hidden: torch.Tensor, following: Sequence[Hop]) -> None:
        names = chunk.names if self._sharing else None
        await hop.send(chunk.step_id, chunk.start, hidden, chunk.hypo_ids, following, names)

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
            await self._pass(hop, chunk, hidden, following)

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
            if output is None or index == len(self.hops):
                return
            behind = self.hops[index]
            # one that has taken the place of the hop that it was pushed to gets its steps in order, from the collector
            if behind in chunk.covered and not behind.is_petals:
                await self._pass(behind, chunk, output, self._pushed_from(index, chunk))
        except (SwarmError, ValueError) as error:
            logger.debug("could not forward for %s: %s", hop.peer_id, error)  # the collector finds the hop failed

    # opening and replacing hops

    async def _replace(self, index: int, error: SwarmError) -> None:
        """Puts other hops in the place of one that failed, with its history played back."""
        failed = self.hops[index]
        self._failures.met(failed, error)
        if isinstance(error, OutOfCacheError):
            await asyncio.sleep(_FULL_RETRY_SECONDS)
        logger.warning("Blocks %d:%d: %s; finding another way…", failed.start, failed.end, error)
        failed.abandon()
        self._tell("failed", [failed], str(error))
        await self._renew(index)

    async def _replace_cropped(self) -> None:
        """Opens new sessions at hops that were to forget columns and can't."""
        for hop in [hop for hop in self.hops if hop.cropped]:
            await hop.close()
            await self._renew(self.hops.index(hop))

    async def _renew(self, index: int) -> None:
        failed = self.hops[index]
        if failed.history.missing:
            raise _InputsMissing
        self._sharing = False  # what comes out of another hop is not quite the same
        replacement = await self._replay(failed)
        self.hops[index : index + 1] = replacement
        self._tell("replaced", replacement)

    async def _replay(self, failed: Hop) -> list[Hop]:
        while True:
            hidden, order = failed.history.replay(self._rows)
            padding = self._left_padding and tuple(self._left_padding[row] for row in order.tolist())
            hops = await self._open_route(failed.start, failed.end, padding)
            hop = hops[0]
            try:
                if hidden is not None:
                    for hop in hops:
                        hidden = await self._refill(hop, hidden)
                return hops
            except BaseException as error:
                for opened in hops:  # also when the caller gives up: nobody else knows them
                    opened.abandon()
                if not isinstance(error, SwarmError):
                    raise
                self._failures.met(hop, error)
                if isinstance(error, OutOfCacheError):
                    await asyncio.sleep(_FULL_RETRY_SECONDS)

    async def _refill(self, hop: Hop, hidden: torch.Tensor) -> torch.Tensor:
        """Plays ``hidden`` into a new hop; its outputs."""
        width = self._width([hop])
        outputs = []
        for at in range(0, hidden.shape[1], width):
            step_id, part = uuid.uuid4().hex, hidden[:, at : at + width]
            await hop.send(step_id, at, part, None, ())
            outputs.append(await self._answer(hop, step_id))
            hop.forget(step_id)
        hop.history.append(0, hidden, None)
        return torch.cat(outputs, dim=1)

    async def _open_route(
        self,
        first: int,
        last: int,
        left_padding: Sequence[int],
        *,
        sharing: tuple[torch.dtype, int] | None = None,
    ) -> list[Hop]:
        """Opens a session at each hop of the best route; looks for another route while one of them fails.

        Where there is no way around a hop without room, it queues there. Then hops are opened one after the other, in
        an order that is the same for everybody: who held one hop while waiting for another could wait for ever.

        Args:
            sharing: the dtype of the inputs, and how many columns of them a hop may have in its cache already.

        Raises:
            MissingBlocksError: there is no route within the time to wait.
            OutOfCacheError: every node that could be asked is full.
            BadRequestError: the session was refused twice.
        """
        needs = Needs(
            rows=self._rows,
            columns=max((chunk.hidden.shape[1] for chunk in self._in_flight.values()), default=1),
            cache_tokens=self._rows * self._max_length,
            left_padding=any(left_padding),
            adapter=self._adapter,
        )
        crowded: set[PeerID] = set()
        while True:
            legs = await self._failures.route(first, last, needs)
            prefixes = self._prefixes(legs, *sharing) if sharing is not None else [None] * len(legs)
            ways = [partial(self._open, leg, left_padding, prefix) for leg, prefix in zip(legs, prefixes, strict=True)]
            opened: list[Any]
            if crowded.isdisjoint(leg.peer_id for leg in legs):
                opened = await open_together(ways)
            else:
                opened = await open_in_order(legs, ways, max(1.0, self._failures.patience))
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
                logger.info("Blocks %d:%d: %s", leg.start, leg.end, error)
                self._failures.met(leg, error)
            full = {leg.peer_id for leg, error in errors if isinstance(error, OutOfCacheError)}
            if full:
                crowded |= full
                await asyncio.sleep(_FULL_RETRY_SECONDS * CHANCE.random())

    def _prefixes(
        self, legs: Sequence[Leg], dtype: torch.dtype, spare: int
    ) -> Sequence[tuple[bytes, list[bytes] | None] | None]:
        """For each hop the context and the names under which it may have the beginning of the session."""
        if self._salt is None or self._names is None:
            return [None] * len(legs)
        names = self._names.between(0, spare)
        model = (self._view.prefix, self._view.fingerprint, self._adapter or "")
        return [(context, names) for context in describe_context(self._salt, model, dtype, legs)]

    async def _open(
        self,
        leg: Leg,
        left_padding: Sequence[int],
        prefix: tuple[bytes, list[bytes] | None] | None,
        *,
        wait: float = 0.0,
    ) -> Hop:
        hop = await Hop.open(
            self._view.peer.p2p,
            leg,
            self._view.prefix,
            rows=self._rows,
            hidden_size=self._hidden_size,
            max_length=self._max_length,
            left_padding=left_padding,
            prefix=prefix,
            adapter=self._adapter,
            wait=wait,
            max_bytes=4 * self._hidden_size * (self._settings.prefill_tokens + self._rows) + 2**20,
            timeout=self._settings.connect_timeout,
        )
        hop.on_push_failed = lambda step_id: self._push_failed(hop, step_id)
        return hop


def _name(hop: Hop) -> HopName:
    return HopName(hop.peer_id.to_base58(), hop.name, hop.start, hop.end)
