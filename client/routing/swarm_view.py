"""What a client knows of its swarm: who serves what, how far away, and who is left out for now."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from hivemind.p2p import PeerID

from swarm.chance import CHANCE
from swarm.errors import MissingBlocksError, SwarmError, UsageError
from swarm.network import dht
from swarm.network.dht import RemoteSpan
from swarm.network.info import ask_info
from swarm.network.peer import Peer, ping
from swarm.wire.limits import MessageLimits, limits_of
from swarm.wire.records import ServerState

from ..settings import ClientSettings
from .bans import Bans
from .left_out import LeftOut, Needs, Seen, explain
from .pulse import Pulse
from .route import Claim, Leg, claims, describe_blocks, find_route
from .slowness import Slowdowns
from .step_times import StepTimes

logger = logging.getLogger(__name__)
_MAX_PINGED = 16
_FULL_SECONDS = 5.0  # how long a node whose KV cache was full is asked last
_SLOW_SECONDS = 60.0  # how long one that was left as it is slow is asked last
_POLL_SECONDS = 0.5
_CLOCK_SECONDS = 2.0  # for others to tell their time
_REASON_CHARS = 300  # of what a stranger says
_NEEDS = Needs()


class SwarmView:
    """Kept fresh in the background from :meth:`start` to :meth:`close`. Lives in one event loop."""

    def __init__(
        self,
        peer: Peer,
        prefix: str,
        num_blocks: int,
        fingerprint: str,
        settings: ClientSettings,
        *,
        inner_boundaries: frozenset[int] = frozenset(),
    ) -> None:
        self.peer, self.prefix, self.num_blocks, self._inner = peer, prefix, num_blocks, inner_boundaries
        self.fingerprint, self._settings = fingerprint, settings
        self._bans = Bans(settings.ban_seconds)
        self._full: dict[PeerID, float] = {}
        self._spans: tuple[RemoteSpan, ...] = ()
        self._unusable: tuple[RemoteSpan, ...] = ()  # other models under the same name, and nodes that are loading
        self._adapters: set[str] = set()  # that were seen so far
        self._rtts: dict[PeerID, float] = {}
        self.step_times = StepTimes()
        self.slowdowns = Slowdowns()
        self.pulse = Pulse(
            lambda peer_id, timeout: ask_info(peer.p2p, peer_id, timeout),
            lambda peer_id: peer.p2p._client.disconnect(peer_id),
            self._bans.succeeded,
            settings.silence,
        )
        self._task: asyncio.Task[None] | None = None
        self._pinging: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Takes a first look.

        Raises:
            UsageError: the swarm serves a model of another shape under this name.
        """
        await self.refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    def close(self) -> None:
        """Ends the background work."""
        self.pulse.close()
        for task in (self._task, *self._pinging):
            if task is not None:
                task.cancel()

    async def refresh(self) -> None:
        """Reads the records anew."""
        blocks = await dht.fetch(self.peer.dht, self.prefix, self.num_blocks)
        spans = tuple(dht.spans_of(blocks).values())
        same = tuple(span for span in spans if self._same_model(span))
        if spans and not same:
            raise UsageError(
                f"the swarm serves a model of another shape as {self.prefix!r}: check that MODEL is the one it serves, "
                "or give the right dht_prefix"
            )
        self._spans = same
        announced = dht.spans_of(blocks, min_state=ServerState.JOINING).values()
        self._unusable = tuple(span for span in announced if span not in same)
        self._adapters.update(*(span.info.adapters for span in same))
        self._ping_new(same)

    def failed(self, peer_id: PeerID, error: SwarmError, ago: float = 0.0) -> None:
        """A peer failed, ``ago`` seconds before now: leave it out for a while."""
        started = next((_started(span) for span in self._spans if span.peer_id == peer_id), 0.0)
        self._bans.failed(peer_id, _one_line(error), started=started, ago=ago)

    def full(self, peer_id: PeerID) -> None:
        """A peer has no KV cache left: ask others first."""
        self._full[peer_id] = time.monotonic() + _FULL_SECONDS

    def slow(self, peer_id: PeerID) -> None:
        """A session has left a peer as it is slow: ask others first."""
        self._full[peer_id] = time.monotonic() + _SLOW_SECONDS

    def leg(self, peer_id: PeerID, start: int, end: int) -> Leg | None:
        """The blocks ``start:end`` at a peer; None if its record is gone."""
        span = next((span for span in self._spans if span.peer_id == peer_id), None)
        return None if span is None else Leg(span, start, end)

    def around(self, peer_id: PeerID, start: int, end: int, needs: Needs) -> tuple[Leg, ...]:
        """The best chain for these blocks that doesn't go through a peer; empty if there is none now."""
        try:
            legs = self._find(start, end, needs, {peer_id})
        except MissingBlocksError:
            return ()
        return () if any(leg.peer_id == peer_id for leg in legs) else legs

    def claims(self, legs: Sequence[Leg]) -> list[Claim]:
        """What a decode step takes along ``legs``, by the nodes' records."""
        return claims(legs, self._rtts)

    def succeeded(self, peer_id: PeerID) -> None:
        """A peer answered well."""
        self.pulse.heard(peer_id)
        self._bans.succeeded(peer_id)

    def cache_tokens(self) -> int | None:
        """The largest session for which every block has a node with a KV cache that large; None if they don't say."""
        held: dict[int, int] = {}
        for span in self._spans:
            total = None if span.info.offer is None else span.info.offer.cache_tokens_total
            if total:
                for block in range(span.start, span.end):
                    held[block] = max(held.get(block, 0), total)
        return min(held.values(), default=None)

    def limits(self, first: int, last: int) -> MessageLimits:
        """The largest message for which each of the blocks ``first:last`` has a node that takes it."""
        rows, tokens = [], []
        for block in range(first, last):
            there = [limits_of(span.info) for span in self._spans if span.start <= block < span.end]
            if there:
                rows.append(max(limits.rows for limits in there))
                tokens.append(max(limits.tokens for limits in there))
        usual = MessageLimits()
        return MessageLimits(min(rows, default=usual.rows), min(tokens, default=usual.tokens))

    def adapters(self) -> list[str]:
        """The LoRA adapters that every block has a node with."""
        having: dict[str, set[int]] = {}
        for span in self._spans:
            for adapter in span.info.adapters:
                having.setdefault(adapter, set()).update(range(span.start, span.end))
        return sorted(adapter for adapter, blocks in having.items() if len(blocks) == self.num_blocks)

    async def route(
        self,
        first: int,
        last: int,
        needs: Needs = _NEEDS,
        *,
        avoid: Container[PeerID] = frozenset(),
        patience: float | None = None,
    ) -> tuple[Leg, ...]:
        """The best chain for the blocks ``first:last``; waits for blocks that are missing at the moment.

        Args:
            avoid: peers to ask only if there is no other way.
            patience: seconds to wait; default: ``wait_timeout``.

        Raises:
            MissingBlocksError: there still is no node that can be used.
            UsageError: no node that was ever seen has the adapter.
            DaemonError: this process's own network daemon is gone.
        """
        needs = replace(needs, deterministic=self._settings.deterministic)
        await self.peer.check_daemon()
        await self._check_adapter(needs.adapter)
        deadline = time.monotonic() + (self._settings.wait_timeout if patience is None else patience)
        announced = False
        while True:
            try:
                return self._find(first, last, needs, avoid)
            except MissingBlocksError as error:
                missing = error.blocks
            await self.peer.check_daemon()
            if time.monotonic() >= deadline:
                raise MissingBlocksError(explain(await self._look_closer(missing, needs)), missing)
            if not announced:
                announced = True
                logger.warning(
                    "Nobody serves %s of %s%s right now; waiting up to %.0f s for a node…%s",
                    describe_blocks(missing),
                    self.prefix,
                    needs.describe(),
                    deadline - time.monotonic(),
                    "".join(f" {node}." for node in self._left_out(missing, needs)),
                )
            await asyncio.sleep(_POLL_SECONDS)
            await self.refresh()

    async def is_worth_waiting(self, peer_id: PeerID, first: int, last: int, needs: Needs) -> bool:
        """Whether to wait for a peer that is overdue with the blocks ``first:last``: it lives, or nobody else can do
        them."""
        if await self.pulse.lives(peer_id):
            return True
        if self.pulse.silent_for(peer_id) is None:
            return False  # it can't be reached at all
        try:
            self._find(first, last, replace(needs, deterministic=self._settings.deterministic), frozenset())
        except MissingBlocksError:
            return True
        return False

    async def _check_adapter(self, adapter: str | None) -> None:
        if not adapter or not self._spans or adapter in self._adapters:
            return
        await self.refresh()
        if self._spans and adapter not in self._adapters:
            known = ", ".join(map(repr, sorted(self._adapters))) or "none"
            raise UsageError(
                f"no node serves an adapter {adapter!r} for {self.prefix}; there is {known} "
                "(swarm-node serve … --adapters)"
            )

    def _find(self, first: int, last: int, needs: Needs, avoid: Container[PeerID]) -> tuple[Leg, ...]:
        now = time.monotonic()
        usable = [span for span in self._spans if self._why_not(span, needs) is None]
        CHANCE.shuffle(usable)  # equals share the load
        others = [span for span in usable if span.peer_id not in avoid]
        roomy = [span for span in others if self._full.get(span.peer_id, 0.0) <= now]
        for candidates in (roomy, others, usable):
            try:
                return find_route(
                    candidates, first, last, rtts=self._rtts, cache_tokens=needs.cache_tokens, inner=self._inner
                )
            except MissingBlocksError as error:
                missing = error
        raise missing

    def _why_not(self, span: RemoteSpan, needs: Needs) -> str | None:
        """Why a node can't be used at the moment; None if it can."""
        if not self._same_model(span):
            return "serves a model of another shape under this name"
        if span.info.state < ServerState.ONLINE:
            return "is still loading"
        unwanted = self._settings.why_not(span.peer_id.to_base58())
        return (
            unwanted
            or needs.unmet(span.info)
            or self._why_silent(span)
            or self._bans.why(span.peer_id, started=_started(span))
        )

    def _why_silent(self, span: RemoteSpan) -> str | None:
        seconds = self.pulse.silent_for(span.peer_id)
        return None if seconds is None else f"has not answered for {seconds:.0f} s (frozen, or the way to it is dead)"

    def _left_out(self, missing: Iterable[int], needs: Needs) -> list[LeftOut]:
        wanted = set(missing)
        partial = "does not have all the blocks that belong together"
        return [
            LeftOut(
                span.peer_id.to_base58(),
                span.info.public_name,
                span.start,
                span.end,
                self._why_not(span, needs) or partial,
            )
            for span in (*self._spans, *self._unusable)
            if not wanted.isdisjoint(range(span.start, span.end))
        ]

    async def _look_closer(self, missing: tuple[int, ...], needs: Needs) -> Seen:
        """What is known of blocks that stay missing. If no node was seen, other peers are asked whether they are there
        and what time it is: records expire by the clock."""
        left_out = self._left_out(missing, needs)
        skews = None if left_out else await self.peer.skews(_CLOCK_SECONDS)
        return Seen(missing, self.prefix, needs, self._settings.wait_timeout, left_out, skews)

    def _same_model(self, span: RemoteSpan) -> bool:
        other = span.info.offer.fingerprint if span.info.offer is not None else ""
        return not other or other == self.fingerprint

    async def _keep_fresh(self) -> None:
        while True:
            await self.peer.lookout.pause(self._settings.update_period)
            try:
                await self.refresh()
            except Exception as error:
                logger.warning("could not look at the swarm, will try again: %s", error)

    def _ping_new(self, spans: Iterable[RemoteSpan]) -> None:
        unknown = [span.peer_id for span in spans if span.peer_id not in self._rtts]
        for peer_id in CHANCE.sample(unknown, min(_MAX_PINGED, len(unknown))):
            task = asyncio.create_task(self._ping(peer_id))
            self._pinging.add(task)
            task.add_done_callback(self._pinging.discard)

    async def _ping(self, peer_id: PeerID) -> None:
        seconds = await ping(self.peer, peer_id, 3.0)
        if seconds is not None:
            self._rtts[peer_id] = seconds
            self.pulse.note(peer_id, seconds)
            again = await ping(self.peer, peer_id, 3.0)  # the first one had to connect
            self._rtts[peer_id] = min(seconds, again or seconds)


def _started(span: RemoteSpan) -> float:
    return span.info.offer.started if span.info.offer else 0.0


def _one_line(error: SwarmError) -> str:
    """What a stranger says, fit to be shown."""
    return "".join(char if char.isprintable() else " " for char in str(error))[:_REASON_CHARS]
