"""What ``swarm-node invite`` does."""

from __future__ import annotations

from dataclasses import replace

from swarm.network.lan.look import find_peers
from swarm.network.lock.invitation import Invitation
from swarm.network.options import LanOptions, PeerOptions
from swarm.network.peer import Peer


async def invite(options: PeerOptions) -> Invitation:
    """An invitation to the swarm of ``options``, which is joined to be sure that the addresses and the key are right.
    Of several keys, it has the first.

    Raises:
        ConnectError, LockedError, UsageError: as :meth:`Peer.start`.
    """
    peers = options.initial_peers
    if options.lan.wanted:
        _, found = await find_peers(options.lan, [])
        peers = (*peers, *found)
    peer = await Peer.start(replace(options, initial_peers=peers, lan=LanOptions(), client=True))
    await peer.stop()
    return Invitation(tuple(peers), next(iter(options.key.keys()), None))
