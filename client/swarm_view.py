"""What a client knows of its swarm: who serves what, how far away, and who is left out for now."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from hivemind.p2p import PeerID

from swarm import dht
from swarm.chance import CHANCE
from swarm.client.bans import Bans
from swarm.client.routing import Leg, describe_blocks, find_route
from swarm.client.settings import ClientSettings
from swarm.dht import RemoteSpan
from swarm.errors import MissingBlocksError, UsageError
from swarm.peer import Peer, ping

logger = logging.getLogger(__name__)
_MAX_PINGED = 16
_FULL_SECONDS = 5.0  # how long a node whose KV cache was full is asked last
_POLL_SECONDS = 0.5
_DETERMINISTIC = " deterministically (nodes say so with swarm-node serve --deterministic)"


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
        self._adapters: set[str] = set()  # that were seen so far
        self._rtts: dict[PeerID, float] = {}
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
        self._adapters.update(*(span.info.adapters for span in same))
        self._ping_new(same)

    def failed(self, peer_id: PeerID) -> None:
        """A peer failed: leave it out for a while."""
        self._bans.failed(peer_id)

    def full(self, peer_id: PeerID) -> None:
        """A peer has no KV cache left: ask others first."""
        self._full[peer_id] = time.monotonic() + _FULL_SECONDS

    def succeeded(self, peer_id: PeerID) -> None:
        """A peer answered well."""
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
        *,
        cache_tokens: int = 0,
        left_padding: bool = False,
        adapter: str | None = None,
    ) -> tuple[Leg, ...]:
        """The best chain for the blocks ``first:last``; waits for blocks that are missing at the moment.

        Args:
            left_padding: only by way of nodes that let rows start later, which Petals' servers can't.
            adapter: only by way of nodes that serve this LoRA adapter.

        Raises:
            MissingBlocksError: still nobody serves them after ``wait_timeout`` seconds.
            UsageError: no node that was ever seen has the adapter.
        """
        if adapter and self._spans and adapter not in self._adapters:
            await self.refresh()
            if self._spans and adapter not in self._adapters:
                known = ", ".join(map(repr, sorted(self._adapters))) or "none"
                raise UsageError(
                    f"no node serves an adapter {adapter!r} for {self.prefix}; there is {known} "
                    "(swarm-node serve … --adapters)"
                )
        deadline = time.monotonic() + self._settings.wait_timeout
        padded = " to rows with padding at their left (pass rows of one length to use servers that can't)"
        whom = f" with the adapter {adapter!r}" if adapter else ""
        whom += (padded if left_padding else "") + (_DETERMINISTIC if self._settings.deterministic else "")
        announced = False
        while True:
            try:
                return self._find(first, last, cache_tokens, left_padding, adapter)
            except MissingBlocksError as error:
                if time.monotonic() >= deadline:
                    raise MissingBlocksError(
                        f"nobody serves {describe_blocks(error.blocks)} of {self.prefix}{whom}, waited "
                        f"{self._settings.wait_timeout:.0f} s: start a node for them (swarm-node serve … --blocks "
                        f"{error.blocks[0]}:{error.blocks[-1] + 1}{' --adapters …' if adapter else ''}) "
                        "or raise wait_timeout",
                        error.blocks,
                    ) from None
                if not announced:
                    announced = True
                    logger.warning(
                        "Nobody serves %s of %s%s right now; waiting up to %.0f s for a node…",
                        describe_blocks(error.blocks),
                        self.prefix,
                        whom,
                        self._settings.wait_timeout,
                    )
            await asyncio.sleep(_POLL_SECONDS)
            await self.refresh()

    def _find(
        self, first: int, last: int, cache_tokens: int, left_padding: bool, adapter: str | None
    ) -> tuple[Leg, ...]:
        now = time.monotonic()
        usable = [
            span
            for span in self._spans
            if (not left_padding or (span.info.offer is not None and span.info.offer.left_padding))
            and (not self._settings.deterministic or (span.info.offer is not None and span.info.offer.deterministic))
            and (not adapter or adapter in span.info.adapters)
            and not self._bans.banned(span.peer_id, started=span.info.offer.started if span.info.offer else 0.0)
        ]
        CHANCE.shuffle(usable)  # equals share the load
        roomy = [span for span in usable if self._full.get(span.peer_id, 0.0) <= now]
        for candidates in (roomy, usable):
            try:
                return find_route(
                    candidates, first, last, rtts=self._rtts, cache_tokens=cache_tokens, inner=self._inner
                )
            except MissingBlocksError as error:
                missing = error
        raise missing

    def _same_model(self, span: RemoteSpan) -> bool:
        other = span.info.offer.fingerprint if span.info.offer is not None else ""
        return not other or other == self.fingerprint

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._settings.update_period)
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
