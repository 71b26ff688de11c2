"""How a process joins the network. hivemind isn't imported, so that the command line starts at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..option import LIST, NETWORK, Form, Only, Option
from .lock.invitation import Invitation, read_invitation
from .lock.key import SwarmKey, given_keys, read_keys

InitialPeers = Annotated[
    Sequence[str],
    Option(
        "Address of a node in the swarm, /ip4/…/tcp/…/p2p/…, as swarm-node serve prints it; several: repeat it or "
        "separate them by commas. For swarm-node, none starts a new private swarm.",
        env="SWARM_INITIAL_PEERS",
        panel=NETWORK,
        metavar="MADDR",
        form=LIST,
    ),
]


@dataclass(frozen=True)
class LanOptions:
    """Whether to find the swarm on the local network. A name is enough to say so."""

    lan: Annotated[
        bool,
        Option(
            "Find the swarm on this network by multicast DNS: no address has to be copied.",
            env="SWARM_LAN",
            panel=NETWORK,
        ),
    ] = False
    lan_name: Annotated[
        str | None,
        Option(
            "As --lan, and which swarm, if there are several: swarm list shows their names.",
            env="SWARM_LAN_NAME",
            panel=NETWORK,
            metavar="NAME",
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether it is asked for."""
        return self.lan or self.lan_name is not None


@dataclass(frozen=True)
class KeyOptions:
    """The key of a private swarm, and who is shut out of it. Nothing of it is shown with the settings."""

    swarm_key: Annotated[
        Sequence[str | os.PathLike[str] | SwarmKey],
        Option(
            "File with the key of a locked swarm, as swarm-node key new prints it; while the key is changed, two: "
            "repeat it. The variable may hold the key itself.",
            env="SWARM_KEY",
            panel=NETWORK,
            metavar="FILE",
            form=Form(list[str] | None, given_keys, lambda keys: None),
        ),
    ] = field(default=(), repr=False)
    join: Annotated[
        Invitation | None,
        Option(
            "Join by an invitation, as swarm-node invite prints it, instead of --initial-peers and --swarm-key: the "
            "line, or better a file with it.",
            env="SWARM_JOIN",
            panel=NETWORK,
            metavar="LINE",
            form=Form(str | None, lambda line: None if line is None else read_invitation(line), lambda _: None),
        ),
    ] = field(default=None, repr=False)
    shut_out: Annotated[
        Path | None,
        Option(
            "File of PeerIDs, one a line, that are refused although they have the key. It is read again when it has "
            "changed.",
            env="SWARM_SHUT_OUT",
            panel=NETWORK,
            metavar="FILE",
        ),
    ] = None

    def keys(self) -> tuple[SwarmKey, ...]:
        """The keys, also that of the invitation.

        Raises:
            UsageError: a file can't be read, or has none.
        """
        invited = () if self.join is None or self.join.key is None else (self.join.key,)
        return read_keys((*self.swarm_key, *invited))

    def peers(self, initial_peers: Sequence[str]) -> tuple[str, ...]:
        """``initial_peers``, and those of the invitation."""
        return tuple(dict.fromkeys((*initial_peers, *(() if self.join is None else self.join.initial_peers))))


Keys = Annotated[KeyOptions, Only("swarm_key", "join")]
"""Of those who take nothing from others, so that there is nobody to shut out."""


@dataclass(frozen=True)
class PeerOptions:
    """How to join.

    Attributes:
        client: only ask, never listen nor store.
        hole_punching: connect directly to peers behind NATs where their NATs let it happen; a client listens for it, on
            a port that the system chooses. Off for all of a process with the environment variable
            ``SWARM_HOLE_PUNCHING=0``.
        known_peers: the file with the peers met before, by which this one joins if no initial peer answers; default:
            beside the identity, if there is one.
        startup_timeout: seconds.
    """

    initial_peers: InitialPeers = ()
    lan: LanOptions = field(default_factory=LanOptions)
    key: KeyOptions = field(default_factory=KeyOptions)
    host: Annotated[str, Option("Address to listen on.", env="SWARM_HOST", panel=NETWORK)] = "0.0.0.0"
    port: Annotated[int, Option("TCP port; 0 takes a free one.", env="SWARM_PORT", panel=NETWORK, min=0, max=65535)] = 0
    announce: Annotated[
        Sequence[str],
        Option(
            "Tell others this address instead of those found.",
            env="SWARM_ANNOUNCE",
            panel=NETWORK,
            metavar="MADDR",
            form=LIST,
        ),
    ] = ()
    public_ip: Annotated[
        str | None, Option("IP under which --port is reached from outside.", env="SWARM_PUBLIC_IP", panel=NETWORK)
    ] = None
    relay: Annotated[
        bool,
        Option(
            "Be reached through relays: for a machine behind a NAT or firewall.",
            env="SWARM_RELAY",
            panel=NETWORK,
            flags=("--relay/--no-relay",),
        ),
    ] = False
    identity: Annotated[
        Path | None,
        Option(
            "File with this peer's key, made when missing; keeps the PeerID over restarts. FILE.peers keeps the peers "
            "that it has met, by which it joins again.",
            env="SWARM_IDENTITY",
            panel=NETWORK,
            metavar="FILE",
        ),
    ] = None
    client: bool = False
    hole_punching: bool = field(default_factory=lambda: os.environ.get("SWARM_HOLE_PUNCHING", "1") != "0")
    known_peers: Path | None = None
    startup_timeout: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial_peers", self.key.peers(self.initial_peers))
