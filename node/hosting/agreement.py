"""Whether a node serves the same as the others of its swarm: model, weights and adapters. Pure functions of records."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from swarm.errors import UsageError
from swarm.wire.records import Offer, ServerInfo, ServerState

Peer = TypeVar("Peer", bound=Hashable)


def require_agreement(records: Sequence[Mapping[Peer, ServerInfo]], me: Peer, mine: Offer, prefix: str) -> None:
    """``records``: for each block, who serves it. ``mine``: what this node is about to announce.

    Raises:
        UsageError: another node serves, under ``prefix``, a model of another shape or other weights, or another
            adapter under the name of one of these.
    """
    offers = list(_offers_of_others(records, me))
    for offer in offers:
        what = ""
        if offer.fingerprint not in ("", mine.fingerprint):
            what = "a model of another shape"
        elif mine.manifest and offer.manifest not in ("", mine.manifest):
            what = f"other weights (manifest {offer.manifest}, here {mine.manifest})"
        if what:
            raise UsageError(
                f"another node serves {what} as {prefix!r} in this swarm: check that "
                "MODEL is the same everywhere, or name this one differently with --dht-prefix"
            )
    for offer in offers:
        for name, digest in mine.adapters.items():
            if offer.adapters.get(name, digest) != digest:
                raise UsageError(
                    f"another node serves another adapter as {name!r} in this swarm: check that it is the same "
                    "one everywhere, or name this one differently with --adapters NAME=DIR_OR_ID"
                )


def _offers_of_others(records: Sequence[Mapping[Peer, ServerInfo]], me: Peer) -> Iterator[Offer]:
    for servers in records:
        for peer_id, info in servers.items():
            if info.offer is not None and info.state != ServerState.OFFLINE and peer_id != me:
                yield info.offer
