"""Looking from time to time whether a node would help its swarm more with other blocks."""

from __future__ import annotations

import asyncio
import logging

from swarm.chance import CHANCE
from swarm.network import dht
from swarm.wire.records import ServerState

from .means import Means
from .placement.balance import better_start, covered_by_others
from .weights.loading import fetch_weights

logger = logging.getLogger(__name__)


async def wait_for_better(means: Means, start: int, end: int, throughput: float) -> tuple[int, list[float]]:
    """Waits until a node that serves ``start:end`` with ``throughput`` (rows per second) would help more elsewhere, and
    gets the weights, so that it is soon up again. Returns the first block there, and each block's throughput by others.
    """
    while True:
        # nodes that look at the same time move together
        await asyncio.sleep(means.settings.balance_period * CHANCE.uniform(0.5, 1.5))
        try:
            found, _ = await _look(means, start, end, throughput)
            if found is None:
                continue
            await fetch_weights(means, found, found + end - start)
            again, covered = await _look(means, start, end, throughput)
            if again == found:  # nobody else has moved there meanwhile
                return found, covered
        except Exception as error:
            logger.warning("could not see to the swarm's balance, will try again: %s", error)


async def _look(means: Means, start: int, end: int, throughput: float) -> tuple[int | None, list[float]]:
    source, me = means.source, means.peer.peer_id
    records = await dht.fetch(means.peer.dht, source.dht_prefix, source.num_blocks)
    online, planned = (
        covered_by_others(records, me, min_state=state, unknown=throughput)
        for state in (ServerState.ONLINE, ServerState.JOINING)
    )
    quality, inner = means.settings.balance_quality, source.inner_boundaries
    return better_start(online, planned, start, end - start, throughput, quality, inner=inner), planned
