"""What a node that serves tells people: how others join, and how to generate."""

from __future__ import annotations

from swarm.network.nat.reachability import UNKNOWN, Reached
from swarm.network.peer import Peer

from ..output import Output
from .means import Means


def say_serving(means: Means, start: int, end: int, ready: tuple[int, int]) -> None:
    """Says that the blocks ``ready`` of the span ``start:end`` are served."""
    model, peer, join = means.settings.model, means.peer, reachable(means.peer)
    fields = {"maddrs": list(peer.addresses), "peer_id": peer.peer_id.to_base58(), "blocks": list(ready)}
    if ready != (start, end):
        text = f"Serving blocks {ready[0]}:{ready[1]} already, until all of {start}:{end} are here. Others join with"
        means.output.event("serving", f"{text} --initial-peers {join}", span=[start, end], **fields)
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
            f"  swarm-node serve {model}{option} --initial-peers {join}",
            "Generate with:",
            f"  swarm chat {model}{option} --initial-peers {join}",
            "or in Python:",
            f"  model = SwarmModelForCausalLM.from_pretrained({model!r}, initial_peers=[{join!r}]{argument})",
            *([f"with LoRA adapters, {by}: {', '.join(adapters)}"] if adapters else []),
        ],
        model=means.source.name,
        adapters=list(adapters),
        **fields,
    )


def say_reached(output: Output, peer: Peer) -> None:
    """Says how others reach this node, as soon as that is known and whenever it changes."""

    def say(now: Reached) -> None:
        output.event("reached", now.describe(), how=now.how, relays=list(now.relays))

    peer.reach.on_change.append(say)
    if peer.reach.now != Reached():
        say(peer.reach.now)


def reachable(peer: Peer) -> str:
    """The address that others can use: not the loopback one, if there is another."""
    others = [address for address in peer.addresses if "/127.0.0.1/" not in address and "/::1/" not in address]
    return (others or peer.addresses)[0]
