"""How a client behaves in a swarm."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from swarm.errors import UsageError
from swarm.option import NETWORK, Option

WaitTimeout = Annotated[
    float, Option("Seconds to wait for blocks nobody serves.", env="SWARM_WAIT_TIMEOUT", panel=NETWORK, min=0)
]


@dataclass(frozen=True)
class ClientSettings:
    """Times are in seconds.

    Attributes:
        wait_timeout: how long to wait for blocks that nobody serves at the moment (a node may be restarting), or for
            room in the KV cache, each in all for a step.
        connect_timeout: to open a session at a hop.
        step_timeout: for one step at one hop, as long as the hop shows that it is alive.
        silence: a hop that says nothing for this long is asked whether it is alive; sooner if its steps usually take
            less.
        update_period: between two looks at who serves what.
        ban_seconds: how long a peer that failed is left out; doubles with each failure in a row.
        prefill_tokens: rows × columns of a step; longer prompts go as several, one behind the other along the route.
        startup_timeout: to join the swarm.
        handover_timeout: how long another node may take to fetch what a node that leaves has in its KV cache; what it
            hasn't got by then is computed again. 0: all of it is.
        leave_slow: whether a session moves away from a node that has become slower than another way would be. Not with
            ``deterministic``: what is computed again has other last bits.
        deterministic: use only nodes whose results don't depend on who else uses them (``swarm-node serve
            --deterministic``), and compute the output head that way too.
        prefix_reuse: which sessions that begin alike share what nodes have in their caches. ``"client"``: those of one
            model in one process. ``"shared"``: those of everybody who says so. Others can then find out by the time
            that a prompt takes whether somebody had it before, and a client that lies about what it sends can spoil
            others' sessions, so all have to trust each other. ``"off"``: none.
        active_adapter: name of the LoRA adapter that a model begins with (``swarm-node serve --adapters``); None: the
            base weights alone.
        allowed_peers: PeerIDs of the only nodes that may be used, the others see nothing; None: all.
        blocked_peers: PeerIDs of nodes that may not be used.
        prefix_salt: a secret that several clients have in common, to share among themselves, with ``"client"``.
    """

    wait_timeout: WaitTimeout = 60.0
    connect_timeout: float = 10.0
    step_timeout: float = 300.0
    silence: float = 5.0
    update_period: float = 20.0
    ban_seconds: float = 3.0
    prefill_tokens: int = 512
    startup_timeout: float = 30.0
    handover_timeout: float = 10.0
    leave_slow: bool = True
    deterministic: bool = False
    prefix_reuse: str = "client"
    prefix_salt: str | None = None
    allowed_peers: Collection[str] | None = None
    blocked_peers: Collection[str] = ()
    active_adapter: Annotated[
        str | None,
        Option(
            "LoRA adapter to use, by its name in the swarm (swarm-node serve … --adapters).",
            env="SWARM_ADAPTER",
            flags=("--adapter",),
            metavar="NAME",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.prefix_reuse not in ("client", "shared", "off"):
            raise UsageError(f"prefix_reuse is 'client', 'shared' or 'off', not {self.prefix_reuse!r}")
        if self.prefix_salt is not None and (self.prefix_reuse != "client" or not self.prefix_salt):
            raise UsageError("prefix_salt is a secret of one character at least, and goes with prefix_reuse='client'")
        for name in ("allowed_peers", "blocked_peers"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))

    def why_not(self, name: str) -> str | None:
        """Why the user doesn't want the node of this PeerID to be used; None if it may be."""
        if name in self.blocked_peers:
            return "is one of blocked_peers"
        return None if self.allowed_peers is None or name in self.allowed_peers else "is none of allowed_peers"

    def salt(self) -> bytes | None:
        """What the names of cached pages are salted with, a new secret each time by default; None to share nothing."""
        if self.prefix_reuse == "off" or self.deterministic:  # what was cached while decoding has other last bits
            return None
        if self.prefix_reuse == "shared":
            return b"shared"
        return b"client" + (os.urandom(16) if self.prefix_salt is None else self.prefix_salt.encode())


def _names(field: str, found: object) -> frozenset[str] | None:
    """PeerIDs as text, from what may be text or hivemind's PeerIDs."""
    if not found:
        return None if found is None else frozenset()
    from swarm.wire.peer_id import read_peer_id  # which needs hivemind; commands start without

    if isinstance(found, str | bytes) or not isinstance(found, Collection):
        raise UsageError(f"{field} is a list of PeerIDs, not {found!r}")
    try:
        return frozenset(read_peer_id(str(each)).to_base58() for each in found)
    except ValueError as error:
        raise UsageError(
            f"{field} has something that is no PeerID ({error}): swarm status --json shows them"
        ) from error
