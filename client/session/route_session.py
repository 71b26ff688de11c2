"""A session along a route: steps go in at the first hop and come out at the last, whatever happens to the hops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from hivemind.p2p import PeerID

from swarm.errors import LeavingError, SwarmError
from swarm.wire.handover import TakeOver

from ..routing.left_out import Needs
from ..routing.pulse import watched
from ..routing.route import Leg
from ..routing.slowness import MOST_COLUMNS, Slowness
from ..routing.step_times import UNKNOWN_SECONDS
from ..routing.swarm_view import SwarmView
from ..settings import ClientSettings
from .failures import Failures, Trial
from .history import History
from .hop import Hop
from .opening import Prefix, abandon, open_route
from .pipeline import Chunk, Pipeline
from .prefix import Digests, PageNames, describe_context
from .repair import InputsMissing, replay
from .trace import HopName, HopTime, RouteEvent, split_time, waited

logger = logging.getLogger(__name__)


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
        self._pipeline: Pipeline[Hop] = Pipeline(settings, self._worth, view.step_times)
        self._slowness: Slowness[Hop] | None = None
        if settings.leave_slow and not settings.deterministic:
            self._slowness = Slowness(view, max_length)
        self._inputs = History()
        self._names: PageNames | None = None
        self._before: tuple[int, PageNames | None] | None = None  # the position and the names as the last step began
        self.position = 0
        self.on_route: Callable[[RouteEvent], None] | None = None
        self.times: tuple[HopTime, ...] = ()  # of the last step, if somebody asks for on_route

    @property
    def hops(self) -> list[Hop]:
        """Along the route now; none before the first step."""
        return self._pipeline.hops

    async def close(self) -> None:
        """Ends the session at all hops."""
        await self._pipeline.close()

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
            except InputsMissing:
                self._pipeline.abandon()

    async def _begin(self, wanted: int) -> tuple[int, torch.Tensor]:
        """Opens all hops, with what is in their caches already: the column where to go on, and the inputs from there.

        The inputs are all that the session has had so far, the step that is under way included.
        """
        inputs, order = self._inputs.replay(self._rows)
        assert inputs is not None
        spare = max(0, inputs.shape[1] - wanted)

        def prefixes(legs: Sequence[Leg]) -> Sequence[Prefix | None]:
            return self._prefixes(legs, inputs.dtype, spare)

        padding = _reordered(self._left_padding, order)
        me = self._view.peer.peer_id
        self._pipeline.hops = await self._open(self._first, self._last, me, padding, self._failures, prefixes)
        self._pipeline.sharing = self._names is not None
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
        await self._leave_slow()
        width = self._width(self.hops)
        began = asyncio.get_running_loop().time()
        chunks = [
            Chunk(
                start + at,
                hidden if columns <= width else hidden[:, at : at + width],
                hypo_ids if at == 0 else None,
                columns <= width,
                self._names.between(start + at, min(start + at + width, start + columns)) if self._names else None,
            )
            for at in range(0, columns, width)
        ]
        try:
            await self._pipeline.begin(chunks)
            outputs = []
            for chunk in chunks:
                outputs.append(await self._collect(chunk))
                self._failures.progress(chunk.start)
            if self.on_route is not None:
                self.times = self._times(began, chunks)
            if self._slowness is not None and columns <= min(MOST_COLUMNS, width):
                answers = [answer for hop in self.hops if (answer := hop.answered(chunks[0].step_id)) is not None]
                if len(answers) == len(self.hops):
                    self._slowness.note(self.hops, waited(began, answers), self._rows * columns, self.position)
        finally:
            self._pipeline.end(chunks)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _times(self, began: float, chunks: Sequence[Chunk]) -> tuple[HopTime, ...]:
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
        self._pipeline.abandon()
        if not self.position:
            self._rows, self._names = 0, None

    async def _collect(self, chunk: Chunk) -> torch.Tensor:
        """Follows a chunk from hop to hop; keeps each hop's input; repairs what fails."""
        hidden, index = chunk.hidden, 0
        while index < len(self.hops):
            hop = self.hops[index]
            try:
                await self._pipeline.send(index, chunk, hidden)
                output = await self._pipeline.wait(index, chunk, hidden)
            except SwarmError as error:
                await self._replace(index, error)
                continue
            self._view.succeeded(hop.peer_id)
            hop.history.append(chunk.start, hidden, chunk.hypo_ids)
            hop.reorders += chunk.hypo_ids is not None
            hidden, index = output, index + 1
        return hidden

    async def _replace(self, index: int, error: SwarmError) -> None:
        """Puts other hops in the place of one that failed, with its history played back."""
        failed = self.hops[index]
        ago = 0.0 if failed.failed_at is None else time.monotonic() - failed.failed_at
        await self._failures.met(failed, error, restarts=failed.restarts, ago=ago)
        await self._failures.pause(error)
        logger.warning("Blocks %d:%d: %s; finding another way…", failed.start, failed.end, error)
        failed.abandon()
        self._tell("failed", [failed], str(error))
        seconds = self._settings.handover_timeout
        await self._renew(index, failed.handover(seconds) if isinstance(error, LeavingError) else None)

    async def _replace_cropped(self) -> None:
        """Opens new sessions at hops that were to forget columns and can't."""
        for hop in [hop for hop in self.hops if hop.cropped]:
            await hop.close()
            await self._renew(self.hops.index(hop))

    async def _leave_slow(self) -> None:
        """Moves away from a hop that is slower than another way would be. If that fails, all is as before."""
        if self._slowness is None:
            return
        move = self._slowness.due(self.hops, self.position, self._rows, lambda hop: self._needs(hop.left_padding))
        if move is None:
            return
        hop = move.hop
        logger.info("Blocks %d:%d: %s; moving there…", hop.start, hop.end, move.reason)
        seconds = self._settings.handover_timeout
        take_over = hop.handover(seconds if hop.history.missing else min(seconds, move.cost))
        moving = self._replacement(hop, take_over, Trial(self._view, self._settings, move.legs))
        try:
            replacement = await asyncio.wait_for(moving, move.patience)
        except (SwarmError, InputsMissing, asyncio.TimeoutError) as error:
            logger.info("Blocks %d:%d stay where they are: %s", hop.start, hop.end, str(error) or type(error).__name__)
            return
        self._view.slow(hop.peer_id)
        self._tell("left", [hop], move.reason)
        try:
            await self._put(self.hops.index(hop), replacement)
            await hop.close()
        finally:
            hop.abandon()

    async def _renew(self, index: int, take_over: TakeOver | None = None) -> None:
        self._pipeline.sharing = False
        await self._put(index, await self._replacement(self.hops[index], take_over, self._failures))

    async def _put(self, index: int, replacement: list[Hop]) -> None:
        self._pipeline.sharing = False  # what comes out of another hop is not quite the same
        self.hops[index : index + 1] = replacement
        self._pipeline.uncover(self.hops[index:])
        for behind in self.hops[index + len(replacement) :][:1]:
            if not behind.is_petals:
                await behind.let_push(replacement[-1].peer_id)
        self._tell("replaced", replacement)

    async def _replacement(self, hop: Hop, take_over: TakeOver | None, failures: Failures) -> list[Hop]:
        """Hops that have what ``hop`` has, ready to take its place."""
        index = self.hops.index(hop)
        before = self.hops[index - 1].peer_id if index else self._view.peer.peer_id

        async def open_hops(order: torch.Tensor) -> list[Hop]:
            padding = _reordered(hop.left_padding, order)
            return await self._open(hop.start, hop.end, before, padding, failures, take_over=take_over)

        return await replay(
            hop,
            self._rows,
            self._pipeline,
            failures,
            open_hops,
            self._width,
            handed_over=take_over is not None,
        )

    async def _open(
        self,
        first: int,
        last: int,
        before: PeerID,
        padding: tuple[int, ...],
        failures: Failures,
        prefixes: Callable[[Sequence[Leg]], Sequence[Prefix | None]] | None = None,
        take_over: TakeOver | None = None,
    ) -> list[Hop]:
        """Hops for the blocks ``first:last``, behind the peer ``before``, for rows with ``padding`` at their left.
        Raises as :func:`open_route`."""

        async def dial(leg: Leg, before: PeerID, prefix: Prefix | None, *, wait: float = 0.0) -> Hop:
            dialing = self._dial(leg, before, padding, prefix, wait, take_over)
            if not self._view.pulse.knows(leg.peer_id):
                return await dialing  # the first connection to a peer may take longer than an answer
            lives = partial(self._view.pulse.lives, leg.peer_id)
            opening: asyncio.Future[Hop] = asyncio.ensure_future(dialing)
            try:
                return await watched(opening, leg.peer_id, UNKNOWN_SECONDS, lives)
            except BaseException:
                opening.add_done_callback(abandon)  # it may be open by now, and nobody else knows it
                raise

        return await open_route(dial, failures, first, last, self._needs(padding), before, prefixes)

    def _needs(self, padding: Sequence[int]) -> Needs:
        return Needs(
            rows=self._rows,
            columns=self._pipeline.columns,
            cache_tokens=self._rows * self._max_length,
            left_padding=any(padding),
            adapter=self._adapter,
        )

    def _prefixes(self, legs: Sequence[Leg], dtype: torch.dtype, spare: int) -> Sequence[Prefix | None]:
        """For each hop the context and the names under which it may have the beginning of the session."""
        if self._salt is None or self._names is None:
            return [None] * len(legs)
        names = self._names.between(0, spare)
        model = (self._view.prefix, self._view.fingerprint, self._adapter or "")
        return [(context, names) for context in describe_context(self._salt, model, dtype, legs)]

    async def _dial(
        self,
        leg: Leg,
        before: PeerID,
        left_padding: Sequence[int],
        prefix: Prefix | None,
        wait: float,
        take_over: TakeOver | None,
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
            hands_over=self._croppable and self._settings.handover_timeout > 0,  # recurrent states stay where they are
            take_over=take_over,
            pusher=before,
        )
        hop.left_padding = tuple(left_padding)
        hop.on_push_failed = lambda step_id: self._pipeline.push_failed(hop, step_id)
        return hop

    async def _worth(self, hop: Hop) -> bool:
        return await self._view.is_worth_waiting(hop.peer_id, hop.start, hop.end, self._needs(hop.left_padding))


def _reordered(padding: tuple[int, ...], order: torch.Tensor) -> tuple[int, ...]:
    return padding and tuple(padding[row] for row in order.tolist())


def _name(hop: Hop) -> HopName:
    return HopName(hop.peer_id.to_base58(), hop.name, hop.start, hop.end)
