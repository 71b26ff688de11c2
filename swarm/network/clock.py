"""The swarm's time. hivemind takes no record from a clock that is more than a few seconds off. So a peer goes by a
clock that nobody sets and nothing stops, and moves it to what the clocks of other peers say: a machine whose clock is
minutes off, was set or slept keeps its place in the swarm."""

from __future__ import annotations

import asyncio
import logging
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import hivemind.dht.node
import hivemind.dht.protocol
import hivemind.dht.routing
import hivemind.utils.timed_storage
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

logger = logging.getLogger(__name__)
TOLERATED_SECONDS = float(MAX_DHT_TIME_DISCREPANCY_SECONDS)
MAX_CORRECTED_SECONDS = 3600.0
_CORRECTED_SECONDS = 1.0  # what is less than this is left alone
_STILL_SECONDS = 5.0  # more than a busy process is late
_SET_SECONDS = 2.0  # a time server that moves the clock slowly doesn't count
_GRACE_SECONDS = 0.5  # for other peers, when one has told its time
_PING = "DHTProtocol.rpc_ping"
_TOLD = re.compile(r"local time must be within.*?local: *([0-9.]+), peer: *([0-9.]+)", re.DOTALL)
_COUNTS_SLEEP = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def _wall() -> float:
    return time.time()


def _steady() -> float:
    return time.monotonic() if _COUNTS_SLEEP is None else time.clock_gettime(_COUNTS_SLEEP)


class SwarmClock:
    """Seconds since the epoch by the swarm's clocks.

    Args:
        wall: this machine's clock, which anybody may set.
        steady: a clock that only goes on, also while the machine sleeps.
    """

    def __init__(self, wall: Callable[[], float] = _wall, steady: Callable[[], float] = _steady) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()
        self._told = 0.0

    def now(self) -> float:
        """The swarm's time."""
        return self._steady() + self._offset

    def wall_ahead(self) -> float:
        """Seconds that this machine's clock is ahead of the swarm's by."""
        return self._wall() - self.now()

    def follow_wall(self) -> None:
        """Takes this machine's clock for the swarm's, when there is nobody else to ask."""
        self._offset = self._wall() - self._steady()

    def correct(self, ahead: float) -> bool:
        """Goes back by ``ahead`` seconds. Does nothing, and says so with False, if it would be too far from this
        machine's clock."""
        if abs(self.wall_ahead() + ahead) > MAX_CORRECTED_SECONDS:
            return False
        self._offset -= ahead
        return True

    def set_by(self, skews: Sequence[float], *, trusting: bool) -> bool:
        """Corrects this clock by how far it is ahead of others' (:func:`to_correct`), and tells a person whose
        machine's clock is off. Whether there was something to correct."""
        ahead = to_correct(skews, trusting=trusting)
        if not ahead:
            return False
        machine_ahead = self.wall_ahead() + ahead
        corrected = self.correct(ahead)
        if abs(machine_ahead) > TOLERATED_SECONDS and abs(machine_ahead - self._told) > TOLERATED_SECONDS:
            self._told = machine_ahead
            until = "; until then this process goes by the swarm's" if corrected else ""
            logger.warning("%s%s", describe_skew(machine_ahead), until)
        return corrected


CLOCK = SwarmClock()
"""That of this process."""
for _module in (
    hivemind.dht.node,
    hivemind.dht.protocol,
    hivemind.dht.routing,
    hivemind.utils.timed_storage,
):
    vars(_module)["get_dht_time"] = CLOCK.now


@dataclass(frozen=True)
class Instant:
    """What the clocks show at one time, in seconds: the one that is set, and the one that only goes on."""

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Instant:
        """This moment."""
        return cls(_wall(), _steady())


def stood_still(before: Instant, after: Instant, slept: float) -> bool:
    """Whether more than the ``slept`` seconds have passed: the machine was suspended, or the process stopped."""
    return after.steady - before.steady > slept + _STILL_SECONDS


def was_set(before: Instant, after: Instant) -> bool:
    """Whether somebody has set the machine's clock."""
    return abs((after.wall - before.wall) - (after.steady - before.steady)) > _SET_SECONDS


def to_correct(skews: Sequence[float], *, trusting: bool) -> float:
    """Seconds to go back by, given how far this peer is ahead of each of some others.

    Args:
        trusting: the others are right, as for a peer that joins or has slept. Else the majority is, this peer included;
            two peers meet in the middle.
    """
    if not skews:
        return 0.0
    # by size: of two that differ, the one that agrees with this peer is right
    agreed = sorted(skews, key=abs)[(len(skews) - 1) // 2]
    ahead = agreed if trusting else statistics.median([0.0, *skews])
    return ahead if abs(ahead) > _CORRECTED_SECONDS else 0.0


def skew_told(error: BaseException) -> float | None:
    """Seconds that this machine's clock is ahead by, if that is why hivemind would not join."""
    found = _TOLD.search(str(error))
    return None if found is None else float(found[1]) - float(found[2])


def describe_skew(seconds: float) -> str:
    """What to do about a clock that is ahead by ``seconds``."""
    way = "ahead of" if seconds > 0 else "behind"
    return f"the clock of this machine is {abs(seconds):.0f} s {way} the swarm's: set it by a time server (NTP)"


async def measure_skews(p2p: P2P, peers: Iterable[PeerID], timeout: float, *, quick: bool = False) -> list[float]:
    """Seconds that this process is ahead of each of ``peers`` by, without those that don't answer within ``timeout``
    seconds. ``quick``: when one has answered, the others are not waited for much longer."""
    pending = {asyncio.ensure_future(_measure(p2p, peer_id, timeout)) for peer_id in peers}
    skews: list[float] = []
    wait: float | None = None
    while pending:
        when = asyncio.FIRST_COMPLETED if wait is None else asyncio.ALL_COMPLETED
        done, pending = await asyncio.wait(pending, timeout=wait, return_when=when)
        skews += [skew for task in done if (skew := task.result()) is not None]
        if wait is not None:
            break
        wait = _GRACE_SECONDS if quick and skews else None
    for task in pending:
        task.cancel()
    return skews


async def _measure(p2p: P2P, peer_id: PeerID, timeout: float) -> float | None:
    asked = CLOCK.now()
    try:
        # without an address of ours the peer doesn't take us into its table
        call = p2p.call_protobuf_handler(peer_id, _PING, dht_pb2.PingRequest(), dht_pb2.PingResponse)
        answer = await asyncio.wait_for(call, timeout)
    except Exception:
        return None
    if not answer.dht_time:
        return None
    doubt = (CLOCK.now() - asked) / 2
    ahead = asked + doubt - float(answer.dht_time)
    return ahead if abs(ahead) > doubt else 0.0
