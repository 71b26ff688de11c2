"""Whether a node serves the same as the others of its swarm: model, weights and adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from hivemind.p2p import P2P, PeerID

from swarm.errors import UsageError
from swarm.network.info import ask_info
from swarm.wire.records import Offer, ServerInfo, ServerState

logger = logging.getLogger(__name__)
Peer = TypeVar("Peer", bound=Hashable)
_ASKED = 16
_SECONDS = 5.0


async def require_agreement(p2p: P2P, found: Mapping[PeerID, str]) -> None:
    """``found``: as :func:`disagreements` has it. Only what peers say counts that are there: anybody can write a record
    about anybody.

    Raises:
        UsageError: what one of them serves is not what this node is about to serve.
    """
    asked = [*found][:_ASKED]
    answers = await asyncio.gather(*(ask_info(p2p, peer_id, _SECONDS) for peer_id in asked), return_exceptions=True)
    for peer_id, answer in zip(asked, answers, strict=True):
        if not isinstance(answer, BaseException):
            raise UsageError(found[peer_id])
        logger.warning("a record of %s, who does not answer, is not believed: %s", peer_id, found[peer_id])


def disagreements(records: Sequence[Mapping[Peer, ServerInfo]], me: Peer, mine: Offer, prefix: str) -> dict[Peer, str]:
    """Who serves, under ``prefix``, a model of another shape or other weights, or another adapter under the name of one
    of these; and what there is to say of it.

    Args:
        records: for each block, who serves it.
        mine: what this node is about to announce.
    """
    found: dict[Peer, str] = {}
    for peer, offer in _offers_of_others(records, me):
        what = ""
        if offer.fingerprint not in ("", mine.fingerprint):
            what = "a model of another shape"
        elif mine.manifest and offer.manifest not in ("", mine.manifest):
            what = f"other weights (manifest {offer.manifest}, here {mine.manifest})"
        if what:
            found[peer] = (
                f"another node serves {what} as {prefix!r} in this swarm: check that "
                "MODEL is the same everywhere, or name this one differently with --dht-prefix"
            )
            continue
        for name, digest in mine.adapters.items():
            if offer.adapters.get(name, digest) != digest:
                found[peer] = (
                    f"another node serves another adapter as {name!r} in this swarm: check that it is the same "
                    "one everywhere, or name this one differently with --adapters NAME=DIR_OR_ID"
                )
    return found


def _offers_of_others(records: Sequence[Mapping[Peer, ServerInfo]], me: Peer) -> Iterator[tuple[Peer, Offer]]:
    for servers in records:
        for peer_id, info in servers.items():
            if info.offer is not None and info.state != ServerState.OFFLINE and peer_id != me:
                yield peer_id, info.offer
