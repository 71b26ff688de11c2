"""Which swarm a client joins: the one of an address that it was given, or one on the local network."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.errors import UsageError
from swarm.network.options import LanOptions
from swarm.weights.sharing.holders import possible_prefixes

from ..runtime import Runtime


def find_swarm(
    initial_peers: tuple[str, ...], lan: bool | str, models: Sequence[str], dht_prefix: str | None = None
) -> tuple[str, ...]:
    """``initial_peers``, or with ``lan`` those of the swarm of this name on the local network; ``True``: of the one
    that serves ``models``.

    Raises:
        ConnectError: there is no such swarm.
        UsageError: there are several, or both are given.
    """
    if lan is False:
        return initial_peers
    if initial_peers:
        raise UsageError(
            "initial_peers (--initial-peers) and lan (--lan) can't be given together: both say which swarm"
        )
    options = LanOptions(lan=True, lan_name=lan if isinstance(lan, str) else None)
    runtime = Runtime.get()
    return runtime.run(runtime.find(options, [possible_prefixes(model, dht_prefix) for model in models]))
