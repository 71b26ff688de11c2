"""Which swarm a client joins: the one of an address that it was given, or one on the local network."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.errors import UsageError
from swarm.network.options import KeyOptions, LanOptions
from swarm.weights.sharing.holders import possible_prefixes

from ..runtime import Runtime


def find_swarm(
    initial_peers: tuple[str, ...],
    lan: bool | str,
    models: Sequence[str],
    dht_prefix: str | None,
    key: KeyOptions,
) -> tuple[str, ...]:
    """``initial_peers`` and those of an invitation, or with ``lan`` those of the swarm of this name on the local
    network; ``True``: of the one that serves ``models``. Who joins by them has the swarm's ``key``.

    Raises:
        ConnectError: there is no such swarm.
        UsageError: there are several, both are given, or there is no key in the file that is given.
    """
    peers, keys = key.peers(initial_peers), key.keys()
    if lan is not False:
        peers = _on_lan(peers, lan, models, dht_prefix)
    if keys:
        Runtime.get().unlock(peers, key)
    return peers


def _on_lan(
    initial_peers: tuple[str, ...], lan: bool | str, models: Sequence[str], dht_prefix: str | None
) -> tuple[str, ...]:
    if initial_peers:
        raise UsageError(
            "initial_peers (--initial-peers) and lan (--lan) can't be given together: both say which swarm"
        )
    options = LanOptions(lan=True, lan_name=lan if isinstance(lan, str) else None)
    runtime = Runtime.get()
    return runtime.run(runtime.find(options, [possible_prefixes(model, dht_prefix) for model in models]))
