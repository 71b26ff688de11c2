"""Joining the network: one libp2p daemon and one DHT node, in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hivemind.dht import DHTNode, node, routing
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.multiaddr import Multiaddr

from ..chance import CHANCE
from ..errors import ConnectError, LockedError, UsageError
from ..wire.peer_id import peer_id_of, read_peer_id
from .clock import CLOCK, describe_skew, measure_skews, skew_told
from .daemon import LastingP2P
from .directory.guard import RecordGuard
from .directory.protocol import GuardedProtocol
from .directory.signing import SigningKey
from .forks import belongs_to_process
from .known_peers import KnownPeers
from .lan.addresses import is_loopback
from .lock.client import LockedClient, is_locked, lock
from .lock.shut_out import ShutOut
from .lookout import Lookout
from .nat.dial_back import DialBack
from .nat.punch import Puncher
from .nat.reachability import Reachability
from .nat.ways import WayfindingP2P
from .options import PeerOptions

if TYPE_CHECKING:
    from .lan.presence import Presence

logging.getLogger("hivemind").setLevel(logging.CRITICAL)  # its warnings repeat, with traces, what we raise ourselves
for _module in (node, routing):
    vars(_module)["random"] = CHANCE  # its names for itself and its turns don't come out of a program's own numbers
vars(node)["DHTProtocol"] = GuardedProtocol  # it has no other way to take one

logger = logging.getLogger(__name__)
_STOP_SECONDS = 2.0
_ASKED = 8  # peers, for their time
_PORT_SECONDS = 3.0
_JOIN_SECONDS = 3.0  # for peers that are to be asked first


class Peer:
    """A daemon (:attr:`p2p`), which is started again when it dies, and a DHT node (:attr:`dht`), which keeps looking
    for the peers it knows (:attr:`lookout`). Unless it is a client's, it finds out how others reach it (:attr:`reach`).

    Attributes:
        presence: on a local network, if any.
        lock: of a private swarm; None: the swarm is open.
        after_restart: is called, one after the other, when the daemon was started again and has rejoined.
    """

    def __init__(
        self, p2p: WayfindingP2P, dht: DHTNode, addresses: Sequence[str], known: KnownPeers, reach: Reachability
    ) -> None:
        self.p2p, self.dht, self.addresses, self.reach = p2p, dht, tuple(addresses), reach
        self.presence: Presence | None = None
        self.lock: LockedClient | None = p2p._client if isinstance(p2p._client, LockedClient) else None
        self.lookout, self._known = Lookout(self, known), known
        reach.on_change.append(lambda _: self.lookout.tell())
        self._dial_back = DialBack(p2p, _start_probe, reach.about)
        self.after_restart: list[Callable[[], Awaitable[None]]] = []
        self._keeping = asyncio.create_task(p2p.keep(self._rejoin))

    @property
    def peer_id(self) -> PeerID:
        """This peer's name."""
        return self.p2p.peer_id

    @classmethod
    async def start(cls, options: PeerOptions) -> Peer:
        """Starts the daemon and joins the DHT.

        Raises:
            ConnectError: no initial peer answers, the port is taken, or the identity is in use.
            LockedError: the swarm has another key, or has one and none is given.
            UsageError: a key, an address or the identity file is malformed.
        """
        for address in (*options.initial_peers, *options.announce):
            _check_address(address, needs_peer=address in options.initial_peers)
        known = KnownPeers(options.initial_peers, options.known_peers or _beside(options.identity))
        try:
            peer = await cls._join(options, known)
        except ConnectError:
            everybody = known.full_addresses()
            if not options.initial_peers or len(everybody) == len(options.initial_peers):
                raise
            logger.warning("no initial peer answers; trying the peers that were met before")
            peer = await cls._join(replace(options, initial_peers=everybody), known)
        if not options.initial_peers and known.peer_ids():  # this was the first one; others may have stayed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(peer.lookout.look(joining=True), _JOIN_SECONDS)
        peer.lookout.start()
        return peer

    @classmethod
    async def _join(cls, options: PeerOptions, known: KnownPeers) -> Peer:
        keys, shut_out = options.key.keys(), ShutOut(options.key.shut_out)
        if shut_out and not keys:
            raise UsageError("--shut-out needs --swarm-key: in an open swarm a peer just takes another PeerID")
        p2p = await _start_daemon(options)
        if keys:
            await lock(p2p, keys, shut_out).open_gate()  # or others would take it for an open one
        try:
            await _set_clock(p2p, options.initial_peers)
            dht = await DHTNode.create(
                p2p,
                initial_peers=list(options.initial_peers),
                record_validator=RecordGuard(_signing_key(p2p, options), p2p.peer_id, CLOCK.now),
                client_mode=options.client or not (_is_alone(options) or options.lan.wanted),  # until others reach it
                cache_locally=False,  # what was forged would stay there
                cache_on_store=False,
                num_workers=32,
                # a node that vanished is asked again soon: it may be back, and our own records are refreshed often
                blacklist_time=2.0,
                backoff_rate=1.5,
            )
        except BaseException as error:
            denied = await _why_denied(p2p, options.initial_peers) if isinstance(error, Exception) else None
            await p2p.shutdown()
            if isinstance(error, Exception):
                if denied is not None:
                    raise LockedError(denied) from error
                skew = skew_told(error)
                why = _unreachable(options.initial_peers) if skew is None else f"can't join: {describe_skew(skew)}"
                raise ConnectError(why) from error
            raise
        addresses = (
            [str(address) for address in await p2p.get_visible_maddrs(latest=True)] if not options.client else []
        )
        alone, relayed = _is_alone(options), options.relay
        reach = Reachability(p2p, dht, addresses, options.initial_peers, relayed=relayed, alone=alone)
        peer = cls(p2p, dht, addresses, known, reach)
        if _listens(options) and options.hole_punching:
            host, port = ("0.0.0.0", 0) if options.client else (options.host, options.port)
            p2p.puncher = Puncher(p2p, host, port, reach.relays)
        if not options.client:
            await peer._dial_back.register()
            if p2p.puncher is not None:
                await p2p.puncher.register()
            await reach.start()
        return peer

    @property
    def restarts(self) -> int:
        """How often the daemon was started again."""
        return self.p2p.restarts

    async def check_daemon(self) -> None:
        """Waits for the daemon if it is being started again: asked when a call has failed.

        Raises:
            DaemonError: it is lost.
        """
        await self.p2p.check()

    async def watch_daemon(self) -> None:
        """Goes on as long as the daemon can be kept up.

        Raises:
            DaemonError: it is lost.
        """
        await asyncio.wait({self._keeping})
        await self.p2p.check()

    async def _rejoin(self) -> None:
        """Finds the known peers again with a daemon that knows nobody, and then tells who wants to know."""
        await self.lookout.look_for_all()
        for tell in [*self.after_restart]:
            try:
                await tell()
            except Exception as error:
                logger.warning("after a restart of the network daemon: %s", error)

    async def skews(self, timeout: float) -> list[float]:
        """Seconds that this machine's clock is ahead of others' by: of peers that answer within ``timeout`` seconds."""
        known = {*map(read_peer_id, self._known.peer_ids()), *self.dht.protocol.routing_table.peer_id_to_uid}
        return await measure_skews(self.p2p, [*known][:_ASKED], timeout)

    async def stop(self) -> None:
        """Leaves the DHT and ends the daemon. Never hangs, even if the daemon is gone already."""
        await self.lookout.stop()
        self._keeping.cancel()
        await asyncio.wait({self._keeping})
        leaving = [] if self.presence is None else [self.presence.stop()]
        leaving += [self.reach.stop(), self._dial_back.stop()]
        if self.p2p.puncher is not None:
            leaving.append(self.p2p.puncher.stop())
        for ending in (*leaving, self.dht.shutdown(), self.p2p.shutdown()):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(ending, _STOP_SECONDS)


async def _set_clock(p2p: LastingP2P, initial_peers: Sequence[str]) -> None:
    """Takes the time of the swarm that is joined."""
    CLOCK.set_by(await measure_skews(p2p, {*map(peer_id_of, initial_peers)}, _JOIN_SECONDS, quick=True), trusting=True)


async def _start_daemon(options: PeerOptions) -> WayfindingP2P:
    if not options.client:
        await _check_port(options.host, options.port)
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
        p2p = await WayfindingP2P.create(
            initial_peers=list(options.initial_peers),
            host_maddrs=[f"/{family}/{options.host}/tcp/{0 if options.client else options.port}"],
            announce_maddrs=announce or None,
            dht_mode="client" if options.client else "server",
            force_reachability="private"
            if options.client or options.relay
            else "public",  # as it relays only then; whether others can reach it, it asks them
            identity_path=str(options.identity) if options.identity is not None else None,
            no_listen=not _listens(options),
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


def _beside(identity: Path | None) -> Path | None:
    """The file for known peers."""
    return None if identity is None else identity.with_name(f"{identity.name}.peers")


def _signing_key(p2p: LastingP2P, options: PeerOptions) -> SigningKey | None:
    """The daemon's own key, for records; None if it can't be had, and then they are not signed."""
    try:
        identity = p2p.identity if options.identity is None else options.identity.read_bytes()
        return SigningKey.read(identity)
    except Exception as error:
        logger.warning("this peer's records are not signed, as its key can't be read: %s", error)
        return None


def _listens(options: PeerOptions) -> bool:
    """A client does so only for peers behind NATs, of which there are none in a swarm on this machine alone."""
    far = not all(is_loopback(address.partition("/p2p/")[0]) for address in options.initial_peers)
    return not options.client or (options.hole_punching and far)


def _is_alone(options: PeerOptions) -> bool:
    """Whether only this machine's own processes can reach the peer."""
    return options.host in ("127.0.0.1", "::1", "localhost") and not options.relay


async def _why_denied(p2p: P2P, initial_peers: Sequence[str]) -> str | None:
    """Whether the swarm doesn't let this peer in, and why."""
    if isinstance(p2p._client, LockedClient):
        return p2p._client.denied
    asking = (is_locked(p2p, peer, _JOIN_SECONDS) for peer in {*map(peer_id_of, initial_peers)})
    if any(await asyncio.gather(*asking)):
        return (
            "this swarm is locked: give its key by --swarm-key FILE (or the variable SWARM_KEY), or join by --join LINE"
        )
    return None


async def _start_probe() -> P2P:
    """A daemon that knows nobody and that nobody knows."""
    probe = await LastingP2P.create(dht_mode="client", host_maddrs=None, no_listen=True, use_relay=False)
    belongs_to_process(probe)
    return probe


def _check_address(address: str, *, needs_peer: bool) -> None:
    try:
        protocols = Multiaddr(address)
        if needs_peer:
            read_peer_id(protocols["p2p"])
    except Exception as error:
        form = "/ip4/192.168.1.5/tcp/31330" + ("/p2p/Qm…" if needs_peer else "")
        raise UsageError(f"{address!r} is no address of a peer: the form is {form}") from error


async def _check_port(host: str, port: int) -> None:
    """
    Raises:
        ConnectError: the port is taken, and stays so: that of a daemon which is just ending becomes free.
    """
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise ConnectError(
                        f"can't listen on {host} port {port} ({error.strerror}): choose another --port"
                    ) from error
        await asyncio.sleep(0.05)


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
