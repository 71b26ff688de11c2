"""How a node joins its swarm."""

from __future__ import annotations

from swarm.model.model_source import ModelSource
from swarm.network.lan.join import start_peer
from swarm.network.peer import Peer
from swarm.weights.sharing.holders import possible_prefixes

from ..output import Output
from ..settings import NodeSettings


async def join(settings: NodeSettings, source: ModelSource | None, output: Output) -> Peer:
    """A peer in the swarm that ``settings`` name, or that is found on the local network; ``source`` if the model is
    known already.

    Raises:
        ConnectError, UsageError: as :func:`start_peer`.
    """
    names = possible_prefixes(settings.model, settings.dht_prefix) if source is None else [source.dht_prefix]
    return await start_peer(settings.peer, [names], output.event)
