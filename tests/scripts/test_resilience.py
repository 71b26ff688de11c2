"""The arithmetic of ``scripts/chaos.py`` and ``scripts/soak.py``."""

from __future__ import annotations

import random

import pytest

from scripts.resilience.faults import Fault, thinnest
from scripts.resilience.probe import Figures
from scripts.resilience.report import kept, pauses
from scripts.resilience.slopes import theil_sen, thinned


def noisy(slope: float, jump: float = 0.0) -> tuple[list[float], list[float]]:
    chance = random.Random(4)
    hours = [index / 60 for index in range(60)]
    values = [100 + slope * hour + chance.gauss(0, 1) for hour in hours]
    values[30] += jump
    return hours, values


def test_growth_is_told_from_noise() -> None:
    grows, stays = theil_sen(*noisy(20.0)), theil_sen(*noisy(0.0))
    assert grows.low < 20 < grows.high
    assert grows.low > 10
    assert stays.low < 0 < stays.high


def test_a_single_jump_is_no_growth() -> None:
    assert theil_sen(*noisy(0.0, jump=500.0)).low < 0


def test_a_line_has_one_slope() -> None:
    slope = theil_sen([0.0, 1.0, 2.0, 3.0], [5.0, 7.0, 9.0, 11.0])
    assert (slope.low, slope.value, slope.high) == (2.0, 2.0, 2.0)


def test_two_points_are_too_few() -> None:
    with pytest.raises(ValueError, match="three"):
        theil_sen([0.0, 1.0], [0.0, 1.0])


def test_stretches_become_points() -> None:
    hours, values = thinned([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 9.0, 2.0, 4.0, 5.0, 60.0], 2)
    assert (hours, values) == ([1.0, 4.0], [2.0, 5.0])


def test_pauses_belong_to_the_faults_that_they_overlap() -> None:
    faults = [Fault("kill", 10.0, 10.0), Fault("kill", 50.0, 50.0), Fault("freeze", 20.0, 30.0)]
    gaps = [(9.0, 9.5), (9.9, 11.0), (11.5, 11.6), (13.0, 19.0), (25.0, 29.0), (40.0, 40.1), (49.9, 50.2)]
    found = pauses(faults, gaps)
    assert found["kill"].count == 2
    assert found["kill"].worst == pytest.approx(1.1)
    assert found["kill"].median == pytest.approx(0.7)
    assert found["freeze"].worst == pytest.approx(4.0)


def test_what_processes_hold_more_of() -> None:
    before = {"a": Figures(100 << 20, 20, 5, 15), "b": Figures(100 << 20, 20, 5, 15)}
    after = {"a": Figures(150 << 20, 25, 5, 20), "b": Figures(300 << 20, 20, 5, 90)}
    assert kept(before, after) == ["b: 100 MB before, 300 MB after", "b: 15 tasks before, 90 after"]


def test_the_thinnest_part_of_a_swarm() -> None:
    assert thinnest([(0, 4), (4, 8), (2, 6)]) == (1, 1, 1, 1, 2, 2, 2, 2)
    assert thinnest([(0, 4)])[:4] == (0, 0, 0, 0)
