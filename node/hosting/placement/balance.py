"""Whether a node would help its swarm more elsewhere. Pure functions, so that tests and simulations call the same code.

As in Petals, each node looks from time to time whether moving its own span would raise what the swarm can do, and moves
only if that is worth the trouble. What is compared are the blocks' throughputs in rising order: first the bottleneck,
then the next weakest. Each move raises that, so nodes that move in turn come to rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from swarm.wire.records import ServerInfo, ServerState

from .blocks import coverage

Peer = TypeVar("Peer", bound=Hashable)


def covered_by_others(
    records: Sequence[Mapping[Peer, ServerInfo]],
    me: Peer,
    *,
    min_state: ServerState = ServerState.JOINING,
    unknown: float = 1.0,
) -> list[float]:
    """Throughput of each block without ``me``. Nodes that don't say theirs yet count as ``unknown``."""
    spans = [
        (block, block + 1, info.throughput or unknown)
        for block, servers in enumerate(records)
        for peer_id, info in servers.items()
        if peer_id != me and info.state >= min_state and info.names(block)
    ]
    return coverage(spans, len(records))


def better_start(
    online: Sequence[float],
    planned: Sequence[float],
    start: int,
    count: int,
    throughput: float,
    quality: float,
    *,
    inner: frozenset[int] = frozenset(),
) -> int | None:
    """Where a node should begin that serves ``count`` blocks from ``start`` on with ``throughput``; None: where it is.

    It doesn't leave a block that nobody else serves, whatever that would be good for.

    Args:
        online: each block's throughput by other nodes that serve it; 0 for nobody.
        planned: with those that are about to.
        quality: from 0 to 1; it moves only if the weakest block that changes has less than this share of what it would
            have then.
        inner: where no span may begin or end (:mod:`swarm.model.layout`).
    """

    def ranked(begin: int) -> list[float]:
        mine = range(begin, begin + count)
        return sorted(others + throughput * (block in mine) for block, others in enumerate(planned))

    alone = [block for block in range(start, start + count) if not online[block]]
    starts = [
        begin
        for begin in range(len(planned) - count + 1)
        if not inner & {begin, begin + count} and all(begin <= block < begin + count for block in alone)
    ]
    best, now = max(starts, key=ranked), ranked(start)
    changed = next(((mine, theirs) for mine, theirs in zip(now, ranked(best), strict=True) if mine != theirs), None)
    return best if changed is not None and changed[0] < quality * changed[1] else None
