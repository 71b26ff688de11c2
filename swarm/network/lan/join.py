"""Starting a peer in the swarm that is found on the local network, or in a new one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ..options import LanOptions, PeerOptions
from ..peer import Peer
from .addresses import multicast_hosts, own_interfaces
from .choice import DEFAULT_NAME, LanSwarm, check_name, for_node
from .look import answering, wait_for
from .multicast import Multicast
from .presence import Presence

_MEET_SECONDS = 1.0
Say = Callable[..., None]  # as node/output.py's event(name, text, **fields)


async def start_peer(options: PeerOptions, models: Sequence[Collection[str]], say: Say) -> Peer:
    """Starts a node's peer as :meth:`Peer.start`; with ``options.lan`` in the swarm of ``models`` on the local network,
    which hears of it from then on.

    Args:
        models: each by the names that it may have in the DHT.

    Raises:
        ConnectError: as Peer.start; there is no local network.
        UsageError: as Peer.start; there are several swarms.
    """
    if not options.lan.wanted:
        return await Peer.start(options)
    check_name(options.lan.lan_name)
    name, peers = await _look(options.lan, models)
    if peers:
        say("lan", f"Joining the swarm {name!r} on this network.", swarm=name, joined=True)
    elif not options.initial_peers:
        text = f"Nobody on this network is in a swarm {name!r} yet: starting it. Others join with {flags(name)}."
        say("lan", text, swarm=name, joined=False)
    peer = await Peer.start(replace(options, initial_peers=(*options.initial_peers, *peers)))
    try:
        presence = Presence(peer, name, announces=True)
        await presence.start()
        # before blocks are chosen: somebody may have started at the same moment
        if not peers and not options.initial_peers and await presence.met_somebody(_MEET_SECONDS):
            text = f"Another node has just started the swarm {name!r} too: the two are one now."
            say("lan", text, swarm=name, joined=True)
    except BaseException:
        await peer.stop()
        raise
    return peer


def flags(name: str) -> str:
    """What says on a command line that this swarm is meant."""
    return "--lan" if name == DEFAULT_NAME else f"--lan-name {shlex.quote(name)}"


async def _look(lan: LanOptions, models: Sequence[Collection[str]]) -> tuple[str, tuple[str, ...]]:
    """The name of the swarm to be in, and addresses of its nodes, if there are any."""
    interfaces = own_interfaces()
    multicast = await Multicast.open(multicast_hosts(interfaces), lambda: None)

    def is_there(swarms: Sequence[LanSwarm]) -> bool:
        name = for_node(swarms, lan.lan_name, models)
        return any(swarm.name == name for swarm in swarms)

    try:
        swarms = await wait_for(multicast, is_there)
    finally:
        await multicast.close()
    name = for_node(swarms, lan.lan_name, models)
    nodes = next((swarm.nodes for swarm in swarms if swarm.name == name), ())
    return name, await answering(nodes, interfaces) if nodes else ()
