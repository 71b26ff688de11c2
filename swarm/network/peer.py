"""Joining the network: one libp2p daemon and one DHT node, in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hivemind.dht import DHTNode, node, routing
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.multiaddr import Multiaddr

from ..chance import CHANCE
from ..errors import ConnectError, DaemonError, UsageError
from .clock import describe_skew, measure_skew, skew_told
from .forks import belongs_to_process
from .nat.dial_back import DialBack
from .nat.reachability import Reachability
from .nat.ways import WayfindingP2P
from .options import PeerOptions

logging.getLogger("hivemind").setLevel(logging.CRITICAL)  # its warnings repeat, with traces, what we raise ourselves
for _module in (node, routing):
    vars(_module)["random"] = CHANCE  # its names for itself and its turns don't come out of a program's own numbers

_STOP_SECONDS = 2.0
_LEAVE_SESSION = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
_ASKED = 8  # peers, for their time
_RELAY_LIMITS = ("-relayTimeLimit=87600h", f"-relayDataLimit={2**50}", "-relayMaxCircuits=1024")  # as good as none


class Peer:
    """A running daemon (:attr:`p2p`) and DHT node (:attr:`dht`). Unless it is a client's, it finds out how others reach
    it (:attr:`reach`)."""

    def __init__(
        self, p2p: P2P, dht: DHTNode, addresses: Sequence[str], initial_peers: Sequence[str], reach: Reachability
    ) -> None:
        self.p2p, self.dht, self.addresses, self.reach = p2p, dht, tuple(addresses), reach
        self._dial_back = DialBack(p2p, _start_probe, reach.about)
        self._initial_peers = [PeerID.from_base58(Multiaddr(address)["p2p"]) for address in initial_peers]

    @property
    def peer_id(self) -> PeerID:
        """This peer's name."""
        return self.p2p.peer_id

    @classmethod
    async def start(cls, options: PeerOptions) -> Peer:
        """Starts the daemon and joins the DHT.

        Raises:
            ConnectError: no initial peer answers, the port is taken, or the identity is in use.
            UsageError: an address or the identity file is malformed.
        """
        for address in (*options.initial_peers, *options.announce):
            _check_address(address, needs_peer=address in options.initial_peers)
        p2p = await _start_daemon(options)
        try:
            dht = await DHTNode.create(
                p2p,
                initial_peers=list(options.initial_peers),
                client_mode=options.client or not _is_alone(options),  # until it is known that others reach it
                num_workers=32,
                # a node that vanished is asked again soon: it may be back, and our own records are refreshed often
                blacklist_time=2.0,
                backoff_rate=1.5,
            )
        except BaseException as error:
            await p2p.shutdown()
            if isinstance(error, Exception):
                skew = skew_told(error)
                why = _unreachable(options.initial_peers) if skew is None else f"can't join: {describe_skew(skew)}"
                raise ConnectError(why) from error
            raise
        addresses = (
            [str(address) for address in await p2p.get_visible_maddrs(latest=True)] if not options.client else []
        )
        alone, relayed = _is_alone(options), options.relay
        reach = Reachability(p2p, dht, addresses, options.initial_peers, relayed=relayed, alone=alone)
        peer = cls(p2p, dht, addresses, options.initial_peers, reach)
        if not options.client:
            await peer._dial_back.register()
            await reach.start()
        return peer

    def check_daemon(self) -> None:
        """Raises DaemonError if the daemon has ended: then nothing that fails says anything about other peers."""
        child = self.p2p._child
        if child is not None and child.returncode is not None:
            raise DaemonError(
                f"this process's network daemon (p2pd) has ended with code {child.returncode}, so no peer can be "
                "reached: start the process again, or open the model anew"
            )

    async def skews(self, timeout: float) -> list[float]:
        """Seconds that this machine's clock is ahead of others' by: of peers that answer within ``timeout`` seconds."""
        known = {*self._initial_peers, *self.dht.protocol.routing_table.peer_id_to_uid}
        asked = (measure_skew(self.dht, peer_id, timeout) for peer_id in [*known][:_ASKED])
        return [skew for skew in await asyncio.gather(*asked) if skew is not None]

    async def stop(self) -> None:
        """Leaves the DHT and ends the daemon. Never hangs, even if the daemon is gone already."""
        for ending in (self.reach.stop(), self._dial_back.stop(), self.dht.shutdown(), self.p2p.shutdown()):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(ending, _STOP_SECONDS)


async def _start_daemon(options: PeerOptions) -> P2P:
    if not options.client:
        _check_port(options.host, options.port)
    if options.identity is not None:
        options.identity.parent.mkdir(parents=True, exist_ok=True)
        _check_identity(options.identity)
    family = "ip6" if ":" in options.host else "ip4"
    announce = list(options.announce)
    if options.public_ip is not None:
        if not options.port:
            raise UsageError("--public-ip needs a fixed --port, so that others know where to connect")
        kind = "ip6" if ":" in options.public_ip else "ip4"
        announce.append(f"/{kind}/{options.public_ip}/tcp/{options.port}")
    try:
        p2p = await _DetachedP2P.create(
            initial_peers=list(options.initial_peers),
            host_maddrs=None if options.client else [f"/{family}/{options.host}/tcp/{options.port}"],
            announce_maddrs=announce or None,
            dht_mode="client" if options.client else "server",
            force_reachability="private"
            if options.client or options.relay
            else "public",  # as it relays only then; whether others can reach it, it asks them
            identity_path=str(options.identity) if options.identity is not None else None,
            no_listen=options.client,
            nat_port_map=False,
            use_relay=True,
            use_auto_relay=options.relay,
            trusted_relays=list(options.initial_peers) if options.relay else None,
            startup_timeout=options.startup_timeout,
        )
        belongs_to_process(p2p)
        return p2p
    except Exception as error:
        text = str(error)
        if "already taken" in text:
            raise ConnectError(
                f"the identity {options.identity} is in use by a running peer: give each node its own --identity"
            ) from error
        if options.initial_peers:
            raise ConnectError(_unreachable(options.initial_peers)) from error
        raise ConnectError(
            f"could not start the network daemon: {text.splitlines()[-1] if text else error!r}"
        ) from error


def _is_alone(options: PeerOptions) -> bool:
    """Whether only this machine's own processes can reach the peer."""
    return options.host in ("127.0.0.1", "::1", "localhost") and not options.relay


async def _start_probe() -> P2P:
    """A daemon that knows nobody and that nobody knows."""
    probe = await _DetachedP2P.create(dht_mode="client", host_maddrs=None, no_listen=True, use_relay=False)
    belongs_to_process(probe)
    return probe


class _DetachedP2P(WayfindingP2P):
    """``P2P`` with the daemon in a session of its own: a Ctrl-C in the terminal is for this process alone, which needs
    the daemon to say goodbye. The daemon still ends with this process, whichever way that ends."""

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        # the command leaves the session, and then becomes the daemon; hivemind lets nobody ask for start_new_session
        daemon = [*P2P._make_process_args(*args, **kwargs), *_RELAY_LIMITS]
        return [sys.executable, "-I", "-S", "-c", _LEAVE_SESSION, *daemon]


def _check_address(address: str, *, needs_peer: bool) -> None:
    try:
        protocols = Multiaddr(address)
        if needs_peer:
            PeerID.from_base58(protocols["p2p"])
    except Exception as error:
        form = "/ip4/192.168.1.5/tcp/31330" + ("/p2p/Qm…" if needs_peer else "")
        raise UsageError(f"{address!r} is no address of a peer: the form is {form}") from error


def _check_port(host: str, port: int) -> None:
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConnectError(
                f"can't listen on {host} port {port} ({error.strerror}): choose another --port"
            ) from error


def _check_identity(path: Path) -> None:
    if not path.exists():
        return
    try:
        PeerID.from_identity(path.read_bytes())
    except Exception as error:
        raise UsageError(f"{path} is no identity file: name one that does not exist yet, and it is made") from error


def _unreachable(addresses: Sequence[str]) -> str:
    return (
        f"none of the initial peers answers ({', '.join(addresses)}): check that the node runs, "
        "that its address is right and that no firewall is in between"
    )


async def ping(peer: Peer, peer_id: PeerID, timeout: float) -> float | None:
    """Round-trip seconds to a peer of the DHT, or ``None`` if it doesn't answer in ``timeout`` seconds."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    request = dht_pb2.PingRequest(peer=peer.dht.protocol.node_info, validate=False)
    try:
        await asyncio.wait_for(peer.dht.protocol.get_stub(peer_id).rpc_ping(request), timeout)
    except Exception:
        return None
    return loop.time() - begin
