"""When a session leaves a slow node: simulated sessions in a made-up swarm, with a made-up clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hivemind.p2p import PeerID
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.routing.left_out import Needs
from swarm.client.routing.route import Claim, Leg, claims, find_route
from swarm.client.routing.slowness import WINDOW, Move, Slowdowns, Slowness
from tests.client.routing.test_routing import peer, span

COLUMNS = 4096
SPANS = [span("first", 0, 4), span("a", 4, 8), span("b", 4, 8)]
CLAIM = claims([Leg(SPANS[1], 4, 8)], {})[0]


def seconds(slowdown: float) -> float:
    return CLAIM.network + slowdown * CLAIM.computing


@dataclass(eq=False)
class Hop:
    peer_id: PeerID
    start: int
    end: int


@dataclass
class Simulation:
    """A session over ``first`` and ``a``. ``slowdown`` has for a node and a time how much it is slower than claimed."""

    slowdown: Callable[[str, float], float]
    now: float = 1000.0
    slowdowns: Slowdowns = field(default_factory=Slowdowns)

    def __post_init__(self) -> None:
        self.hops = [Hop(peer("first"), 0, 4), Hop(peer("a"), 4, 8)]
        self.moves: list[tuple[int, Move[Hop]]] = []
        self.slowness: Slowness[Hop] = Slowness(self, COLUMNS, lambda: self.now)
        self.position = 100

    def leg(self, peer_id: PeerID, start: int, end: int) -> Leg | None:
        return next(Leg(span, start, end) for span in SPANS if span.peer_id == peer_id)

    def around(self, peer_id: PeerID, start: int, end: int, needs: Needs) -> tuple[Leg, ...]:
        others = [span for span in SPANS if span.peer_id != peer_id]
        return find_route(others, start, end, rtts={}) if start else ()

    def claims(self, legs: Sequence[Leg]) -> list[Claim]:
        return claims(legs, {})

    @property
    def at(self) -> str:
        return "a" if self.hops[1].peer_id == peer("a") else "b"

    def run(self, steps: int) -> Simulation:
        for _ in range(steps):
            move = self.slowness.due(self.hops, self.position, 1, lambda hop: Needs())
            if move is not None:
                self.moves.append((self.position, move))
                self.hops[1] = Hop(move.legs[0].peer_id, 4, 8)
            took = [seconds(self.slowdown(name, self.now)) for name in ("first", self.at)]
            self.now += sum(took)
            self.slowness.note(self.hops, took, 1, self.position)
            self.position += 1
        return self


def test_a_node_that_alone_becomes_slow_is_left_soon_and_for_good() -> None:
    simulation = Simulation(lambda name, now: 2.0).run(60)
    assert not simulation.moves
    simulation.slowdown = lambda name, now: 10.0 if name == "a" else 2.0
    simulation.run(2 * WINDOW)
    ((_, move),) = simulation.moves
    assert move.hop.peer_id == peer("a")
    assert [leg.peer_id for leg in move.legs] == [peer("b")]
    assert move.seconds == pytest.approx(seconds(10))
    assert move.elsewhere == pytest.approx(seconds(2))
    assert move.reason == f"a step takes {1e3 * seconds(10):.0f} ms, elsewhere about {1e3 * seconds(2):.0f} ms"
    assert len(simulation.run(1000).moves) == 1


def test_a_slow_node_is_left_again_if_the_other_one_becomes_slower() -> None:
    def slowdown(name: str, now: float) -> float:
        return 10.0 if name == ("a" if now < 1100 else "b") and now > 1005 else 2.0

    simulation = Simulation(slowdown).run(1000)
    assert [move.hop.peer_id for _, move in simulation.moves] == [peer("a"), peer("b")]
    assert simulation.at == "a"


@settings(max_examples=30)
@given(st.lists(st.floats(0.85, 1.2), min_size=300, max_size=300), st.floats(0.5, 50.0))
def test_nobody_moves_while_all_are_as_slow(noise: list[float], usual: float) -> None:
    noises = iter(noise * 2)
    assert not Simulation(lambda name, now: usual * next(noises)).run(300).moves


@settings(max_examples=20)
@given(st.lists(st.sampled_from((0.5, 1.0, 2.0, 8.0, 30.0)), min_size=1, max_size=20), st.floats(2.0, 90.0))
def test_few_moves_while_all_become_slow_and_quick_together(factors: list[float], period: float) -> None:
    def slowdown(name: str, now: float) -> float:
        return factors[int((now - 1000) / period) % len(factors)]

    simulation = Simulation(slowdown).run(1500)
    assert len(simulation.moves) <= 1 + math.log2(1 + (simulation.now - 1000) / 30)


@settings(max_examples=30)
@given(
    st.lists(st.integers(3, 40), min_size=10, max_size=30),  # steps from one to the next
    st.floats(2.0, 10_000.0),
)
def test_single_slow_steps_move_nobody(distances: list[int], slow: float) -> None:
    when = {sum(distances[: index + 1]) for index in range(len(distances))}
    simulation = Simulation(lambda name, now: 1.0)
    simulation.slowdown = lambda name, now: slow if name != "first" and simulation.position - 100 in when else 1.0
    assert not simulation.run(sum(distances) + 5).moves


def test_records_that_were_always_wrong_say_nothing() -> None:
    """The first hop keeps its record's word, the others are of another kind."""
    assert not Simulation(lambda name, now: 1.0 if name == "first" else 2.8).run(1000).moves


def test_a_node_that_was_slow_from_the_beginning_is_left() -> None:
    assert len(Simulation(lambda name, now: 10.0 if name == "a" else 1.0).run(1000).moves) == 1


def test_a_move_that_comes_too_late_is_not_made() -> None:
    def moves(left: int) -> int:
        simulation = Simulation(lambda name, now: 10.0 if name == "a" else 1.0)
        simulation.position = COLUMNS - left
        return len(simulation.run(left).moves)

    assert not moves(WINDOW + WINDOW // 2)
    assert moves(1000)


def test_sizes_of_steps_are_kept_apart() -> None:
    simulation = Simulation(lambda name, now: 1.0)
    for _ in range(200):
        simulation.run(1)
        simulation.slowness.note(simulation.hops, [seconds(8), seconds(8)], 64, simulation.position)
    assert not simulation.moves
