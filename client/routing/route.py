"""Finds the quickest chain of spans for one token. A pure function of what is known about the swarm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hivemind.p2p import PeerID

from swarm.errors import MissingBlocksError
from swarm.model.layout import check_range
from swarm.network.dht import RemoteSpan
from swarm.ranges import as_ranges, describe

DEFAULT_RTT = 0.02
"""Seconds assumed for a pair of peers that nobody has measured."""
HOP_SECONDS = 0.001
"""What a hop costs beyond computing and network: coding, queueing."""
DEFAULT_BLOCK_SECONDS = 0.003
"""Per block, for a node that doesn't say how fast it is."""
NO_CACHE_SECONDS = 10.0
"""Penalty for a node whose KV cache is too full: chosen only if there is no other way."""
_PREFILL_SPEEDUP = 8
"""How much less a column takes in a prefill than in a decode step, for a node that doesn't say."""
SESSION_LOAD = 0.05
"""How much each session of a node slows the next one down: sessions are batched, so little."""
_ARRIVALS_KEPT = 8


@dataclass(frozen=True)
class Leg:
    """The part ``start:end`` of a span that a route uses."""

    span: RemoteSpan
    start: int
    end: int

    @property
    def peer_id(self) -> PeerID:
        """The peer that serves it."""
        return self.span.peer_id


class Claim(NamedTuple):
    """The seconds of a decode step in one leg."""

    network: float
    computing: float


@dataclass(frozen=True)
class _Arrival:
    """The cheapest known way to have done all blocks before some block, ending at a peer."""

    cost: float
    leg: Leg | None
    previous: _Arrival | None


def find_route(
    spans: Iterable[RemoteSpan],
    first: int,
    last: int,
    *,
    rtts: Mapping[PeerID, float],
    cache_tokens: int = 0,
    inner: frozenset[int] = frozenset(),
) -> tuple[Leg, ...]:
    """The chain for the blocks ``first:last`` that one token passes quickest.

    Dynamic programming over blocks: every leg leads to a later block, so when a block is looked at, all ways to it are
    known. A leg may begin anywhere in a span; it ends where the span ends or where another span begins; neither at an
    ``inner`` boundary.

    Args:
        spans: who serves what.
        rtts: round-trip seconds from this client to peers.
        cache_tokens: tokens for which a session needs room.
        inner: boundaries between blocks of which one node has to do all (:mod:`swarm.model.layout`).

    Raises:
        UsageError: ``first:last`` begins or ends at one of those.
        MissingBlocksError: nobody serves some of the blocks.
    """
    check_range(first, last, inner)
    whole = (_without_parts(span, inner) for span in spans) if inner else spans
    usable = [span for span in whole if span.start < last and span.end > first]
    covered = [[span for span in usable if span.start <= block < span.end] for block in range(first, last)]
    missing = [first + index for index, there in enumerate(covered) if not there]
    if missing:
        raise MissingBlocksError(f"no node serves {describe_blocks(missing)}", missing)
    starts = sorted({span.start for span in usable})
    arrivals: list[list[_Arrival]] = [[] for _ in range(last + 1)]
    arrivals[first] = [_Arrival(0.0, None, None)]
    for block in range(first, last):
        for arrival in sorted(arrivals[block], key=lambda arrival: arrival.cost)[:_ARRIVALS_KEPT]:
            for span in covered[block - first]:
                if arrival.leg is not None and arrival.leg.peer_id == span.peer_id:
                    continue
                reach = min(span.end, last)
                entry = arrival.cost + _network(arrival.leg, span, rtts) + HOP_SECONDS
                for end in (*(start for start in starts if block < start < reach), reach):
                    cost = entry + (end - block) * _block_seconds(span)
                    cost += _cache_penalty(span, end - block, cache_tokens)
                    if end == last:
                        cost += rtts.get(span.peer_id, DEFAULT_RTT) / 2
                    arrivals[end].append(_Arrival(cost, Leg(span, block, end), arrival))
    best: _Arrival | None = min(arrivals[last], key=lambda arrival: arrival.cost)
    legs: list[Leg] = []
    while best is not None and best.leg is not None:
        legs.append(best.leg)
        best = best.previous
    return tuple(reversed(legs))


def claims(legs: Sequence[Leg], rtts: Mapping[PeerID, float]) -> list[Claim]:
    """What a decode step from here along ``legs`` and back takes in each of them, by the nodes' records."""
    network, before = [], None
    for leg in legs:
        network.append(_network(before, leg.span, rtts))
        before = leg
    network[-1] += rtts.get(legs[-1].peer_id, DEFAULT_RTT) / 2
    return [
        Claim(way, HOP_SECONDS + (leg.end - leg.start) * _block_seconds(leg.span))
        for way, leg in zip(network, legs, strict=True)
    ]


def fill_seconds(leg: Leg, tokens: int) -> float:
    """What it takes to compute ``tokens`` anew in a leg, by the node's record."""
    rps = leg.span.info.forward_rps
    return (leg.end - leg.start) * tokens * (1.0 / rps if rps else _block_seconds(leg.span) / _PREFILL_SPEEDUP)


def _without_parts(span: RemoteSpan, inner: frozenset[int]) -> RemoteSpan:
    """``span`` without the blocks at its ends that can't be used, as those that they belong to aren't there."""
    start, end = span.start, span.end
    while start in inner:
        start += 1
    while end in inner and end > start:
        end -= 1
    return replace(span, start=start, end=end)


def describe_blocks(blocks: Sequence[int]) -> str:
    """``[3, 4, 5, 9]`` as ``"blocks 3:6, 9:10"``."""
    return f"blocks {describe(as_ranges(blocks))}"


def _network(before: Leg | None, span: RemoteSpan, rtts: Mapping[PeerID, float]) -> float:
    if before is None:
        return rtts.get(span.peer_id, DEFAULT_RTT) / 2
    pings = before.span.info.next_pings or {}
    return pings.get(span.peer_id.to_base58(), DEFAULT_RTT) / 2


def _block_seconds(span: RemoteSpan) -> float:
    rps = span.info.inference_rps
    seconds = 1.0 / rps if rps else DEFAULT_BLOCK_SECONDS
    sessions = span.info.offer.sessions if span.info.offer is not None else 0
    return seconds * (1.0 + SESSION_LOAD * sessions)


def _cache_penalty(span: RemoteSpan, blocks: int, cache_tokens: int) -> float:
    left = span.info.cache_tokens_for(blocks)
    return NO_CACHE_SECONDS if left is not None and left < cache_tokens else 0.0
