"""The swarm's time: how a peer comes to it, and what moves it."""

from __future__ import annotations

import logging

import hivemind.dht.protocol
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network.clock import CLOCK, MAX_CORRECTED_SECONDS, Instant, SwarmClock, stood_still, to_correct, was_set

SKEW = st.floats(-600, 600)


def test_hivemind_goes_by_it() -> None:
    assert hivemind.dht.protocol.get_dht_time == CLOCK.now


def test_setting_the_machines_clock_does_not_move_it() -> None:
    wall, steady = 1000.0, 5.0
    clock = SwarmClock(lambda: wall, lambda: steady)
    wall, steady = 1100.0, 6.0
    assert clock.now() == 1001.0
    assert clock.wall_ahead() == 99.0
    clock.follow_wall()
    assert clock.now() == 1100.0


def test_a_joining_peer_takes_the_swarms_time_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = SwarmClock(lambda: 1095.0, lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        assert clock.set_by([95.0, 95.4, 0.0], trusting=True)
        assert clock.now() == 1000.0
        assert not clock.set_by([0.2], trusting=True), "as right as can be"
        assert clock.set_by([1.5, 1.5], trusting=False)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the clock of this machine is 95 s ahead of the swarm's: set it by a time server")


def test_nobody_leads_a_peer_too_far(caplog: pytest.LogCaptureFixture) -> None:
    clock = SwarmClock(lambda: 1e6, lambda: 0.0)
    for _ in range(3):
        assert not clock.set_by([MAX_CORRECTED_SECONDS + 5], trusting=True)
    assert clock.now() == 1e6
    assert len(caplog.records) == 1


@given(SKEW, st.integers(1, 5), SKEW)
def test_the_majority_is_right(mine: float, right: int, liar: float) -> None:
    """Others agree with each other, but for fewer than that, and this peer goes to them; or it stays with them."""
    skews = [mine] * (right + 1) + [liar] * (right - 1)
    moved = to_correct(skews, trusting=False)
    assert abs(mine - moved) <= 1.0


@given(SKEW, SKEW)
def test_two_peers_meet(one: float, other: float) -> None:
    for _ in range(12):
        one -= to_correct([one - other], trusting=False)
        other -= to_correct([other - one], trusting=False)
    assert abs(one - other) <= 2.0


def test_of_two_that_differ_the_one_that_agrees_is_believed() -> None:
    assert to_correct([0.1, 100.0], trusting=True) == 0.0
    assert to_correct([100.0, 0.1], trusting=True) == 0.0
    assert to_correct([], trusting=True) == 0.0


def test_a_machine_that_slept_or_was_set() -> None:
    before = Instant(1000.0, 10.0)
    assert not stood_still(before, Instant(1001.3, 11.3), 1.0)
    assert not was_set(before, Instant(1001.3, 11.3))
    assert stood_still(before, Instant(1060.0, 70.0), 1.0), "suspended: both go on"
    assert was_set(before, Instant(1060.0, 11.0)), "set, or a clock that stood still with the machine was"
    assert was_set(before, Instant(900.0, 11.0))
