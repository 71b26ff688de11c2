"""What the network daemon can do and hivemind doesn't offer."""

from __future__ import annotations

from collections.abc import Sequence

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerInfo
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

_FIND_SECONDS = 3


async def find_addresses(p2p: P2P, peer_id: PeerID) -> tuple[str, ...]:
    """Where a peer listens, by its own word; at once if it is connected. Without the part ``/p2p/…``.

    Raises:
        Exception: nobody knows (hivemind's errors).
    """
    find = p2pd_pb2.DHTRequest(type=p2pd_pb2.DHTRequest.FIND_PEER, peer=peer_id.to_bytes(), timeout=_FIND_SECONDS)
    response = await _ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=find))
    return tuple(map(str, PeerInfo.from_protobuf(response.dht.peer).addrs))


async def connect(p2p: P2P, peer_id: PeerID, addresses: Sequence[str]) -> None:
    """Connects to a peer, also if that has failed a moment ago, after which a mere call would not be tried.

    Raises:
        Exception: it doesn't answer at any of the addresses.
    """
    await p2p._client.connect(peer_id, [Multiaddr(address) for address in addresses])


async def dial(p2p: P2P, peer_id: PeerID, addresses: Sequence[str], seconds: int) -> None:
    """As :func:`connect`, and gives up after ``seconds``.

    Raises:
        Exception: it doesn't answer at any of the addresses, or not in time.
    """
    wanted = [Multiaddr(address).to_bytes() for address in addresses]
    connecting = p2pd_pb2.ConnectRequest(peer=peer_id.to_bytes(), addrs=wanted, timeout=seconds)
    await _ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connecting))


async def direct_connections(p2p: P2P) -> dict[PeerID, list[str]]:
    """The peers to which there is a connection without a relay, and where they are at its other end."""
    found = {
        peer.peer_id: [str(address) for address in peer.addrs if "/p2p-circuit" not in str(address)]
        for peer in await p2p.list_peers()
    }
    return {peer_id: addresses for peer_id, addresses in found.items() if addresses}


async def _ask(p2p: P2P, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()  # type: ignore[no-untyped-call]
        await read_pbmsg_safe(reader, response)
    finally:
        writer.close()
    raise_if_failed(response)
    return response
