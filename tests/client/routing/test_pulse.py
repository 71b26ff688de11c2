"""Whether a peer lives: who is asked, how long an answer may take, and what is done about silence."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from hivemind.p2p import PeerID

from swarm.client.routing import pulse as module
from swarm.client.routing.pulse import Pulse, answer_seconds, watched
from swarm.errors import PeerLostError
from tests.client.routing.test_routing import peer

ONE = peer("one")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLOOR_SECONDS", 0.2)
    monkeypatch.setattr(module, "_ASK_AGAIN_SECONDS", 0.01)


class Peers:
    """All of them, which answer after ``delay`` seconds while they are not ``frozen``; each was near before."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.frozen, self.refuses = delay, False, False
        self.asked = self.disconnected = 0
        self.back: list[PeerID] = []
        self.pulse = Pulse(self._ask, self._disconnect, self.back.append, 0.5)
        self.pulse.note(ONE, 0.001)

    async def _ask(self, peer_id: PeerID, timeout: float) -> None:
        self.asked += 1
        if self.refuses:
            raise ConnectionError
        deadline = time.monotonic() + timeout
        await asyncio.sleep(self.delay)
        while self.frozen:
            if time.monotonic() > deadline:
                raise asyncio.TimeoutError
            await asyncio.sleep(0.01)

    async def _disconnect(self, peer_id: PeerID) -> None:
        self.disconnected += 1


def test_how_long_an_answer_may_take() -> None:
    assert answer_seconds([], 5.0) == 5.0
    assert answer_seconds([0.01, 0.02], 5.0) == 0.2
    assert answer_seconds([0.01, 0.3], 5.0) == 0.6
    assert answer_seconds([9.0], 5.0) == 5.0


def test_who_asks_at_the_same_time_shares_the_answer() -> None:
    async def run() -> None:
        peers = Peers(delay=0.02)
        assert await asyncio.gather(*(peers.pulse.lives(ONE) for _ in range(5))) == [True] * 5
        assert peers.asked == 1

    asyncio.run(run())


def test_a_frozen_peer_is_silent_until_it_answers_and_its_connection_is_closed_once() -> None:
    async def run() -> None:
        peers = Peers()
        peers.frozen = True
        assert not await peers.pulse.lives(ONE)
        assert not await peers.pulse.lives(ONE)
        assert peers.pulse.silent_for(ONE) is not None
        assert peers.disconnected == 0
        while peers.asked < 4:
            await asyncio.sleep(0.01)
        assert peers.disconnected == 1
        peers.frozen = False
        while peers.pulse.silent_for(ONE) is not None:
            await asyncio.sleep(0.01)
        assert await peers.pulse.lives(ONE)
        assert peers.back == [ONE]
        peers.pulse.close()

    asyncio.run(run())


def test_a_connection_that_was_idle_for_long_is_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        peers = Peers()
        monkeypatch.setattr(module, "_IDLE_SECONDS", 0.0)
        await asyncio.sleep(0.01)
        peers.frozen = True
        assert not await peers.pulse.lives(ONE)
        await asyncio.sleep(0.01)
        assert (peers.disconnected, peers.asked) == (1, 2)
        peers.pulse.close()

    asyncio.run(run())


def test_a_peer_that_is_only_slow_has_more_time_at_the_next_question() -> None:
    async def run() -> None:
        peers = Peers(delay=0.3)
        assert not await peers.pulse.lives(ONE)
        while peers.pulse.silent_for(ONE) is not None:
            await asyncio.sleep(0.01)
        assert await peers.pulse.lives(ONE)
        assert not peers.disconnected
        peers.pulse.close()

    asyncio.run(run())


def test_a_peer_that_refuses_the_connection_is_not_waited_for() -> None:
    async def run() -> None:
        peers = Peers()
        peers.refuses = True
        assert not await peers.pulse.lives(ONE)
        assert peers.pulse.silent_for(ONE) is None

    asyncio.run(run())


def test_time_that_the_client_itself_has_slept_does_not_count() -> None:
    async def run() -> None:
        peers = Peers(delay=0.05)
        asking = asyncio.ensure_future(peers.pulse.lives(ONE))
        await asyncio.sleep(0)
        time.sleep(0.4)  # noqa: ASYNC251 - the event loop stands still, for longer than an answer may take
        assert await asking

    asyncio.run(run())


def test_work_is_watched() -> None:
    async def slow() -> str:
        await asyncio.sleep(0.1)
        return "done"

    async def yes() -> bool:
        asked.append(True)
        return True

    async def no() -> bool:
        return False

    async def never() -> bool:
        await asyncio.sleep(60)
        return False

    asked: list[bool] = []
    assert asyncio.run(watched(slow(), ONE, 60.0, no)) == "done", "it is not overdue"
    assert asyncio.run(watched(slow(), ONE, 0.01, never)) == "done", "it came while the peer was asked"
    assert asyncio.run(watched(slow(), ONE, 0.01, yes)) == "done"
    assert len(asked) > 1
    with pytest.raises(PeerLostError, match="does not answer"):
        asyncio.run(watched(slow(), ONE, 0.01, no))


def test_what_ends_badly_when_nobody_waits_any_more_is_not_logged() -> None:
    told: list[object] = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise PeerLostError("unreachable") from None

    async def no() -> bool:
        return False

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, about: told.append(about))
        with pytest.raises(PeerLostError, match="does not answer"):
            await watched(stubborn(), ONE, 0.01, no)
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(run())
    assert not told
