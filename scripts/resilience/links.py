"""A proxy in front of each node's port, which can be slow or let nothing through."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter


class Links:
    """Proxies, in a thread of their own: what others connect to."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.delay: dict[int, float] = {}
        """Seconds by which what goes to a port, and comes from it, is late; infinite: nothing passes."""
        self.held: Counter[int] = Counter()
        """Bytes that were late, by port."""

    def open(self, target: int) -> int:
        """A port that leads to this one."""

        async def serve() -> int:
            server = await asyncio.start_server(lambda r, w: self._join(r, w, target), "127.0.0.1", 0)
            return int(server.sockets[0].getsockname()[1])

        return asyncio.run_coroutine_threadsafe(serve(), self._loop).result(10)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back, target), self._pass(there, writer, target))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        deliver = asyncio.create_task(self._deliver(under_way, writer, target))
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await under_way.put((self._loop.time(), data))
        await under_way.put((self._loop.time(), b""))
        await deliver

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, target: int
    ) -> None:
        while True:
            since, data = await under_way.get()
            if target in self.delay:
                self.held[target] += len(data)
            while self._loop.time() < since + self.delay.get(target, 0.0):
                await asyncio.sleep(0.05)
            if not data:
                break
            if not writer.is_closing():  # whoever is gone is sent nothing, and the rest is thrown away
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
        writer.close()
