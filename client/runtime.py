"""The background event loop that all clients of a process share, and their connections to swarms."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Collection, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from swarm.errors import ConnectError
from swarm.network.forks import belongs_to_process, is_forked, refuse_fork
from swarm.network.lan.look import find_peers
from swarm.network.lan.presence import Presence
from swarm.network.options import KeyOptions, LanOptions
from swarm.network.peer import Peer, PeerOptions

T = TypeVar("T")


class Runtime:
    """An event loop in a daemon thread. :meth:`get` gives the process's one."""

    _instance: Runtime | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self._run, name="swarm-client", daemon=True).start()
        weakref.finalize(self, _park, self.loop)  # at exit, behind what models do then, which were made later
        belongs_to_process(self)
        self._peers: dict[tuple[str, ...], tuple[Peer, int]] = {}
        self._peers_lock = asyncio.Lock()
        self._lan: dict[tuple[str, ...], str] = {}  # the names of swarms that were found on the local network
        self._keys: dict[tuple[str, ...], KeyOptions] = {}

    @classmethod
    def get(cls) -> Runtime:
        """The runtime of this process.

        Raises:
            UsageError: the process was forked from one that has a runtime.
        """
        refuse_fork()
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` in the loop and waits for its result. An interrupt of the caller cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs ``work`` in the loop without waiting.

        Raises:
            UsageError: this is a fork of the process that the loop runs in.
        """
        if is_forked():
            work.close()
        refuse_fork()
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def find(self, lan: LanOptions, models: Sequence[Collection[str]]) -> tuple[str, ...]:
        """Initial peers of the swarm of ``models`` on the local network. A peer that joins by them goes on
        looking there.

        Raises:
            ConnectError, UsageError: as :func:`find_peers`.
        """
        name, initial_peers = await find_peers(lan, models)
        self._lan[initial_peers] = name
        return initial_peers

    def unlock(self, initial_peers: tuple[str, ...], key: KeyOptions) -> None:
        """From now on a peer that joins by ``initial_peers`` has this key."""
        self._keys[initial_peers] = key

    async def join(
        self, initial_peers: tuple[str, ...], *, startup_timeout: float, known_peers: Path | None = None
    ) -> Peer:
        """A peer in the swarm of ``initial_peers``, shared by all who ask; given back with :meth:`leave`.

        Args:
            known_peers: the file of others to join by.

        Raises:
            ConnectError: none of the initial peers answers.
            LockedError: the swarm has another key, or has one and none is known.
        """
        async with self._peers_lock:
            peer, users = self._peers.get(initial_peers, (None, 0))
            if peer is None:
                options = PeerOptions(
                    initial_peers=initial_peers,
                    key=self._keys.get(initial_peers, KeyOptions()),
                    client=True,
                    startup_timeout=startup_timeout,
                    known_peers=known_peers,
                )
                peer = await Peer.start(options)
                if (name := self._lan.get(initial_peers)) is not None:
                    with suppress(ConnectError):  # it is in the swarm already
                        await Presence(peer, name, announces=False).start()
            self._peers[initial_peers] = (peer, users + 1)
            return peer

    async def leave(self, initial_peers: tuple[str, ...]) -> None:
        """Gives a peer back; the last one to do so ends it."""
        async with self._peers_lock:
            peer, users = self._peers[initial_peers]
            if users > 1:
                self._peers[initial_peers] = (peer, users - 1)
                return
            del self._peers[initial_peers]
            await peer.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


def _park(loop: asyncio.AbstractEventLoop) -> None:
    """Has the loop's thread wait for ever: what came from the network when the interpreter is gone would be a
    segmentation fault. A loop that is stopped would complain of tasks that are not done."""
    if is_forked():
        return
    parked = threading.Event()

    def park() -> None:
        parked.set()
        threading.Event().wait()

    loop.call_soon_threadsafe(park)
    parked.wait(1.0)
