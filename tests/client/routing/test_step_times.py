"""When a step is overdue."""

from __future__ import annotations

import pytest

from swarm.client.routing.step_times import KEPT, UNKNOWN_SECONDS, StepTimes
from tests.client.routing.test_routing import peer

ONE, OTHER = peer("one"), peer("other")


def test_a_peer_that_nobody_knows_has_a_second() -> None:
    times = StepTimes()
    for _ in range(3):
        times.add(ONE, 1, 0.01)
    assert times.overdue_after(ONE, 1) == UNKNOWN_SECONDS
    times.add(ONE, 1, 0.01)
    assert times.overdue_after(ONE, 1) == pytest.approx(0.015)
    assert times.overdue_after(OTHER, 1) == UNKNOWN_SECONDS


def test_one_step_in_a_hundred_may_take_longer() -> None:
    times = StepTimes()
    for number in range(200):
        times.add(ONE, 1, 9.0 if number % 100 == 50 else 0.1)
        if 2 < number < 150:
            assert times.overdue_after(ONE, 1) == pytest.approx(0.15)
    assert times.overdue_after(ONE, 1) == pytest.approx(0.15)
    times.add(ONE, 1, 9.0)
    assert times.overdue_after(ONE, 1) == pytest.approx(13.5)


def test_a_long_prefill_says_nothing_about_a_token() -> None:
    times = StepTimes()
    for _ in range(8):
        times.add(ONE, 512, 4.0)
        times.add(ONE, 1, 0.1)
    assert times.overdue_after(ONE, 512) == pytest.approx(6.0)
    assert times.overdue_after(ONE, 1) == pytest.approx(0.15)


def test_what_was_long_ago_is_forgotten() -> None:
    times = StepTimes()
    for _ in range(KEPT):
        times.add(ONE, 1, 5.0)
    for _ in range(KEPT):
        times.add(ONE, 1, 0.2)
    assert times.overdue_after(ONE, 1) == pytest.approx(0.3)
