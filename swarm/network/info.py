"""Asking a node about itself."""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from ..wire import rpc


async def ask_info(p2p: P2P, peer_id: PeerID, timeout: float) -> runtime_pb2.ExpertInfo:
    """A node's answer to ``rpc_info``.

    Raises:
        asyncio.TimeoutError: there is none within ``timeout`` seconds.
        Exception: the node refuses (``P2PHandlerError``), or can't be reached (hivemind's other errors).
    """
    name = rpc.handle_name(rpc.INFO)
    call = p2p.call_protobuf_handler(peer_id, name, runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo)
    return await asyncio.wait_for(call, timeout)
