"""How the network's daemon is started."""

from __future__ import annotations

import asyncio
import os
import subprocess

from swarm.network.peer import Peer, PeerOptions


def test_the_daemon_alone_is_in_a_session_of_its_own() -> None:
    """A Ctrl-C is not for it. What else this process starts at that time stays in the terminal's session."""

    async def session_of_another() -> int:
        other = await asyncio.subprocess.create_subprocess_exec("cat", stdin=subprocess.PIPE)
        session = os.getsid(other.pid)
        await other.communicate(b"")
        return session

    async def run() -> None:
        starting = asyncio.create_task(Peer.start(PeerOptions(host="127.0.0.1")))
        while not starting.done():
            assert await session_of_another() == os.getsid(0)
        peer = await starting
        daemon = peer.p2p._child.pid
        assert os.getsid(daemon) == daemon
        await peer.stop()

    asyncio.run(run())
