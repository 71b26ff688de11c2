"""A node looks whether it would help more elsewhere: twice, since others look too, and again after a failure."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from swarm.network import dht
from swarm.node.hosting.moving import wait_for_better
from swarm.wire.records import ServerInfo, ServerState
from tests.models import tiny_model
from tests.node.hosting.swarm_of_two import Recorder, make_means, two_peers


def test_it_moves_only_if_nobody_else_has_moved_there(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with two_peers() as (node, other):
            means = make_means(tiny_model("llama-gqa", layers=4), node, Recorder(), count=2, balance_period=0.01)
            prefix, looks, get_many = means.source.dht_prefix, 0, node.dht.get_many

            async def serve(first: int, last: int, state: ServerState) -> None:
                await dht.announce(other.dht, prefix, first, last, ServerInfo(state, 1e5), ttl=60)

            async def look(*args: Any, **kwargs: Any) -> Any:
                nonlocal looks
                looks += 1
                if looks == 1:
                    raise OSError("no network")
                if looks == 3:  # the second of a pair: another node has come to 2:4 since the first
                    await serve(2, 4, ServerState.JOINING)
                if looks == 5:
                    await serve(2, 4, ServerState.OFFLINE)
                return await get_many(*args, **kwargs)

            node.dht.get_many = look  # hivemind's
            await serve(0, 2, ServerState.ONLINE)
            start, covered = await asyncio.wait_for(wait_for_better(means, 0, 2, 1.0), 60)
            assert (start, covered) == (2, [1e5, 1e5, 0.0, 0.0])
            assert looks == 6

    asyncio.run(main())
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [(logging.WARNING, "could not see to the swarm's balance, will try again: no network")]
