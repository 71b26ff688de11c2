"""How many sessions decode together: by the arithmetic, and in a simulated swarm on a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.node.engine.scheduling.gathering import BatchCosts, Gatherer, group_size


def test_others_are_waited_for_where_that_saves_more_than_it_costs() -> None:
    gatherer = Gatherer(worth=0.5, reach=1.25)
    assert gatherer.patience_s(10.0, 1, 10.0, [10.01]) == 0, "nothing is known yet"
    gatherer.ran(10.0, 0.08, None)
    assert gatherer.patience_s(10.0, 1, 10.0, []) == 0
    assert gatherer.patience_s(10.0, 1, 10.0, [10.2, 9.9]) == 0, "one is far away, one seems to have gone"
    assert gatherer.patience_s(10.0, 1, 10.0, [10.03]) == pytest.approx(0.04), "one waits 30 ms: worth 40 to each"
    assert gatherer.patience_s(10.0, 1, 10.0, [10.09]) == 0, "90 ms is too long for two"
    assert gatherer.patience_s(10.0, 1, 10.0, [10.09] * 15) == pytest.approx(0.1), "but not if fifteen come"
    assert gatherer.patience_s(10.0, 15, 10.0, [10.09]) == 0, "fifteen don't wait so long for one"
    assert gatherer.patience_s(10.0, 1, 9.94, [10.03] * 9) == pytest.approx(0.04), "nor does anyone for ever"
    assert gatherer.patience_s(10.0, 4, 10.0, [10.03] * 4, 8) == pytest.approx(0.04)
    assert gatherer.patience_s(10.0, 8, 10.0, [10.03] * 4, 8) == 0, "as many as are to decode together are here"
    assert gatherer.usual(None, 0.5) == 0.5
    assert 0.2 < gatherer.usual(0.2, 0.3) < 0.3


def test_costs_are_those_seen_lately() -> None:
    costs = BatchCosts()
    assert costs.seconds(4) == 0
    costs.add(0.0, 16, 0.08)
    assert costs.seconds(16) == costs.seconds(20) == 0.08
    assert costs.seconds(8) == pytest.approx(0.06), "hopeful, so that it is tried"
    costs.add(1.0, 8, 0.12)
    assert costs.seconds(8) == 0.12, "it is worse: the machine is shared, perhaps"
    assert costs.seconds(12) == pytest.approx(0.1)
    costs.add(25.0, 4, 0.05)
    assert costs.seconds(8) == 0.05, "the others are too old"


@given(st.integers(1, 100), st.floats(0, 10), st.floats(0.001, 1), st.floats(0, 0.1))
def test_a_group_is_a_part_of_all(sessions: int, away_s: float, fixed: float, each: float) -> None:
    assert 1 <= group_size(sessions, away_s, lambda size: fixed + each * size) <= sessions


def test_groups_follow_one_another_only_while_the_node_has_nothing_to_do() -> None:
    def seconds(size: int) -> float:
        return 0.04 + 0.0025 * size

    assert group_size(16, 0.0, seconds) == 16, "nobody is ever away"
    assert group_size(16, 0.08, seconds) == 8, "another node takes as long"
    assert group_size(40, 0.3, seconds) == 10, "more others, or they are further away"
    assert group_size(16, 0.2, lambda size: 0.04) == 16, "no batch is quicker than any other"


@dataclass
class _Node:
    gatherer: Gatherer = field(default_factory=Gatherer)
    ready: list[int] = field(default_factory=list)
    since: float = 0.0
    running: list[int] = field(default_factory=list)
    waited: float = 0.0
    left: float = 0.0
    answered: dict[int, float] = field(default_factory=dict)
    usual: dict[int, float] = field(default_factory=dict)
    until: float | None = None
    asked: float | None = None


def _rate(sessions: int, nodes: int, seconds: Callable[[int], float], *, in_turns: bool = False) -> float:
    """Tokens a second of ``sessions`` that go through ``nodes``, of which only one computes at a time if ``in_turns``;
    2 ms from node to node, and the sessions' clients need 2 ms each, one after the other."""
    chance, step, end = random.Random(0), 0.001, 12.0
    swarm = [_Node() for _ in range(nodes)]
    coming = [(chance.random() / 2, 0, session) for session in range(sessions)]
    done, now = 0, 0.0
    while now < end:
        now += step
        for moment, index, session in [event for event in coming if event[0] <= now]:
            coming.remove((moment, index, session))
            node = swarm[index]
            if session in node.answered:
                node.usual[session] = node.gatherer.usual(node.usual.get(session), now - node.answered.pop(session))
            node.since = node.since if node.ready else now
            node.ready.append(session)
            node.until = None
        for index, node in enumerate(swarm):
            node.left -= step
            if node.running and node.left <= 0:
                node.gatherer.ran(now, seconds(len(node.running)), len(node.running), waited_s=node.waited)
                for place, session in enumerate(node.running):
                    node.answered[session] = now
                    last = index + 1 == nodes
                    done += last and now > end / 2
                    coming.append((now + 0.002 * (place + 2 if last else 1), (index + 1) % nodes, session))
                node.running, node.since, node.until = [], now, None
            if node.running or not node.ready or (node.until is not None and now < node.until):
                continue
            size = node.gatherer.size(now, node.usual.values())
            due = [moment + node.usual[session] for session, moment in node.answered.items() if session in node.usual]
            wait = node.gatherer.patience_s(now, len(node.ready), node.since, due, size)
            if wait and node.until is None and node.asked is None:
                node.until = now + wait
                continue
            node.asked = now if node.asked is None else node.asked
            if in_turns and any(other.running or (other.asked or now) < node.asked for other in swarm):
                continue
            node.running, node.ready, node.until = node.ready[:size], node.ready[size:], None
            node.waited, node.asked, node.left = now - node.asked, None, seconds(len(node.running))
    return done / (end / 2)


def test_a_simulated_swarm_keeps_its_nodes_busy() -> None:
    def seconds(size: int) -> float:
        return 0.04 + 0.0026 * size

    all_at_once = 16 / (2 * seconds(16) + 0.034)
    assert _rate(16, 2, seconds) > 1.25 * all_at_once
    alone = 16 / (seconds(16) + 0.034)
    assert _rate(16, 1, seconds) > 0.9 * alone
    assert _rate(16, 2, seconds, in_turns=True) > 0.95 * all_at_once, "they share a machine"
