"""What a node that serves tells people: how others join, and how to generate."""

from __future__ import annotations

from swarm.network.lan.addresses import announced, own_interfaces
from swarm.network.lan.choice import DEFAULT_NAME
from swarm.network.lan.join import flags
from swarm.network.nat.reachability import UNKNOWN, Reached
from swarm.network.peer import Peer

from ..output import Output
from .means import Means


def say_serving(means: Means, start: int, end: int, ready: tuple[int, int]) -> None:
    """Says that the blocks ``ready`` of the span ``start:end`` are served."""
    model, peer, join = means.settings.model, means.peer, how_to_join(means.peer)
    python = f"initial_peers=[{reachable(peer)!r}]"
    if peer.presence is not None:
        python = "lan=True" if peer.presence.swarm == DEFAULT_NAME else f"lan={peer.presence.swarm!r}"
    if peer.lock is not None:
        python += ", swarm_key='swarm.key'"
    fields = {"maddrs": list(peer.addresses), "peer_id": peer.peer_id.to_base58(), "blocks": list(ready)}
    if ready != (start, end):
        text = f"Serving blocks {ready[0]}:{ready[1]} already, until all of {start}:{end} are here. Others join with"
        means.output.event("serving", f"{text} {join}", span=[start, end], **fields)
        return
    if peer.reach.now.how == UNKNOWN:
        means.output.event("reached", peer.reach.now.describe(), how=UNKNOWN, relays=[])
    option, argument = ("", "") if means.source.store is None else (" --weights peers", ", weights='peers'")
    adapters = means.adapter_names
    by = "by --adapter or model.active_adapter"
    means.output.panel(
        "ready",
        f"Serving blocks {start}:{end} of {means.source.name}",
        [
            "Others join with:",
            f"  swarm-node serve {model}{option} {join}",
            "Generate with:",
            f"  swarm chat {model}{option} {join}",
            "or in Python:",
            f"  model = SwarmModelForCausalLM.from_pretrained({model!r}, {python}{argument})",
            *(
                [f"beyond this network with --initial-peers {reachable(peer)}{how_to_unlock(peer)}"]
                if peer.presence is not None
                else []
            ),
            *([f"with LoRA adapters, {by}: {', '.join(adapters)}"] if adapters else []),
        ],
        model=means.source.name,
        adapters=list(adapters),
        **fields,
    )


def how_to_join(peer: Peer) -> str:
    """What others add to their commands."""
    join = flags(peer.presence.swarm) if peer.presence is not None else f"--initial-peers {reachable(peer)}"
    return join + how_to_unlock(peer)


def how_to_unlock(peer: Peer) -> str:
    """What they add besides in a locked swarm. It names a file: the key itself is never shown."""
    return "" if peer.lock is None else " --swarm-key swarm.key"


def say_reached(output: Output, peer: Peer) -> None:
    """Says how others reach this node, as soon as that is known and whenever it changes."""

    def say(now: Reached) -> None:
        output.event("reached", now.describe(), how=now.how, relays=list(now.relays))

    peer.reach.on_change.append(say)
    if peer.reach.now != Reached():
        say(peer.reach.now)


def reachable(peer: Peer) -> str:
    """The address that others can use: one in a local network, if it has any, and not loopback nor docker's."""
    if peer.reach.now.relays:
        return peer.reach.now.relays[0]  # nobody begins with a peer that is behind a relay
    usable = announced(peer.addresses, own_interfaces())
    return f"{usable[0]}/p2p/{peer.peer_id.to_base58()}" if usable else peer.addresses[0]
