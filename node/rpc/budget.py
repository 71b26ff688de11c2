"""What strangers may take of a node at a time: streams, calls, and memory for messages. One peer gets a quarter."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hivemind.p2p import PeerID

from swarm.errors import OutOfCacheError

_SHARE = 4
_WAIT_SECONDS = 300.0  # what holds the memory goes on without what waits for it
_MAX_STREAMS = 4096
_FILES_BESIDE = 256  # that a node has open besides its streams
_CALLS = 256
_MEMORY_BYTES = 2**28
_MESSAGES = 4  # of the largest, that one peer may always have here: a backward pass is three


class Quota:
    """``most`` of something for all peers together, ``of_one`` for each."""

    def __init__(self, most: int, of_one: int) -> None:
        self._most, self._of_one = most, of_one
        self._taken: Counter[PeerID] = Counter()
        self._total = 0
        self._waiting: deque[tuple[PeerID, int, asyncio.Future[None]]] = deque()

    def take(self, peer: PeerID, amount: int = 1) -> bool:
        """Takes so much for a peer, if it may have it. Who has nothing gets what it asks for if it is there."""
        mine = self._taken[peer]
        if self._total + amount > self._most or (mine and mine + amount > self._of_one):
            if not mine:
                del self._taken[peer]  # nothing is kept of any number of peers
            return False
        self._taken[peer] += amount
        self._total += amount
        return True

    async def wait(self, peer: PeerID, amount: int) -> None:
        """Takes so much when it is there; of one peer, who came first is first.

        Raises:
            OutOfCacheError: it isn't, for long.
        """
        if all(other != peer for other, _, _ in self._waiting) and self.take(peer, amount):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = peer, amount, turn
        self._waiting.append(mine)
        try:
            await asyncio.wait({turn}, timeout=_WAIT_SECONDS)  # wait_for loses cancellations before Python 3.12
            if not turn.done():
                raise OutOfCacheError("this node has no memory for more of your messages now")
        except BaseException:
            if turn.done():
                self.give_back(peer, amount)
            else:
                self._waiting.remove(mine)
            raise

    def give_back(self, peer: PeerID, amount: int = 1) -> None:
        """Gives back what was taken."""
        self._total -= amount
        self._taken[peer] -= amount
        if not self._taken[peer]:
            del self._taken[peer]
        late: set[PeerID] = set()
        for waiting in [*self._waiting]:
            other, wanted, turn = waiting
            if self._total + wanted > self._most:
                break  # or who wants much would wait for ever
            if other not in late and self.take(other, wanted):
                self._waiting.remove(waiting)
                turn.set_result(None)
            else:
                late.add(other)


class Turns:
    """For each peer one thing at a time, in the order in which they came. Nothing is kept of any number of peers.

    Attributes:
        waiting: how many there are of each peer, the one whose turn it is among them.
    """

    def __init__(self) -> None:
        self.waiting: Counter[PeerID] = Counter()
        self._locks: dict[PeerID, asyncio.Lock] = {}

    @asynccontextmanager
    async def of(self, peer: PeerID) -> AsyncIterator[None]:
        """Waits for a turn, and has it."""
        self.waiting[peer] += 1
        try:
            async with self._locks.setdefault(peer, asyncio.Lock()):
                yield
        finally:
            self.waiting[peer] -= 1
            if not self.waiting[peer]:
                del self.waiting[peer], self._locks[peer]


class Room:
    """The memory that one peer may fill."""

    def __init__(self, quota: Quota, peer: PeerID) -> None:
        self._quota, self._peer = quota, peer

    def try_take(self, size: int) -> bool:
        """Takes so many bytes if they are there."""
        return self._quota.take(self._peer, size)

    async def take(self, size: int) -> None:
        """Takes so many bytes when they are there. Raises as :meth:`Quota.wait`."""
        await self._quota.wait(self._peer, size)

    def give_back(self, size: int) -> None:
        """Gives them back."""
        self._quota.give_back(self._peer, size)


class Budget:
    """Of a node whose messages have ``message_bytes`` at most.

    Attributes:
        streams: that are open, sessions and all.
        calls: requests in one message, under way.
    """

    def __init__(self, message_bytes: int) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        streams = min(_MAX_STREAMS, max(_SHARE, files - _FILES_BESIDE))
        memory = max(_MEMORY_BYTES, _SHARE * _MESSAGES * message_bytes)
        self.streams = Quota(streams, streams // _SHARE)
        self.calls = Quota(_CALLS, _CALLS // _SHARE)
        self._memory = Quota(memory, memory // _SHARE)

    def room(self, peer: PeerID) -> Room:
        """The memory for messages from and to a peer."""
        return Room(self._memory, peer)


def raise_file_limit() -> None:
    """Lets this process have as many files open as it may: each stream is one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_STREAMS if hard == resource.RLIM_INFINITY else min(hard, 2 * _MAX_STREAMS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
