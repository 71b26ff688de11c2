"""A TCP connection through two NATs, which both sides open at once.

Two daemons that dial each other would both speak first. So one side's connection is made here, from the port on which
its daemon listens, and joined to that port: the daemon there has been dialed. A mere attempt to dial, so that the own
NAT lets the other side in, is not enough: Linux's NATs take an answer only from the socket that asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

_AGAIN_SECONDS = 0.02  # after a router has refused the connection, as the other side has not dialed yet
_CHUNK = 1 << 18
Place = tuple[str, int]


async def punch(own: Place, other: Place, seconds: float) -> socket.socket | None:
    """A connection from the address on which the daemon listens; None if the other side doesn't come in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while loop.time() < deadline:
        outside = _socket()
        try:
            outside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            outside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            outside.bind(own)
            await asyncio.wait_for(loop.sock_connect(outside, other), deadline - loop.time())
        except asyncio.TimeoutError:
            outside.close()
        except OSError:
            outside.close()
            await asyncio.sleep(_AGAIN_SECONDS)
        except BaseException:
            outside.close()
            raise
        else:
            return outside
    return None


async def join(outside: socket.socket, daemon: Place) -> None:
    """Lets the daemon have the connection, until one of both ends it."""
    with outside, _socket() as inside:
        for each in (outside, inside):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        outside.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_connect(inside, daemon)
            copying = {asyncio.create_task(_copy(outside, inside)), asyncio.create_task(_copy(inside, outside))}
            try:
                await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in copying:
                    task.cancel()
                await asyncio.wait(copying)


def _socket() -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    return made


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(source, _CHUNK):
            await loop.sock_sendall(target, data)
