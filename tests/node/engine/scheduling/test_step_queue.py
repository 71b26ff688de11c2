"""Who runs next of the sessions whose steps wait, and when to wait for those that decode: on a clock of its own."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from swarm.node.engine.cache.kv_cache import Row
from swarm.node.engine.scheduling.row_group import RowGroup
from swarm.node.engine.scheduling.step_queue import StepQueue
from swarm.node.engine.scheduling.work import StepWork


class Scene:
    """A queue, and sessions that decode with batches of 80 ms."""

    def __init__(self) -> None:
        self.now = 10.0
        self.queue = StepQueue(64, clock=lambda: self.now)

    def step(self, session: RowGroup, columns: int = 1) -> StepWork:
        work = StepWork(torch.zeros(1, columns, 4), 0, None, None, Future(), arrived_at=self.now)
        self.queue.add(session, work)
        return work

    def run(self, seconds: float = 0.08) -> list[RowGroup]:
        """One turn, in which all work that is taken ends."""
        takes = self.queue.plan()
        self.now += seconds
        decode = sum(take.columns for take in takes if take.work.decodes)
        prefill = sum(take.columns for take in takes) - decode
        self.queue.ran(len(takes), seconds, prefill=prefill, decode=decode, waited_s=0.0)
        for take in takes:
            assert self.queue.drop_first(take.session) is take.work
            if take.work.decodes:
                self.queue.answered(take.session)
        return [take.session for take in takes]


def session(first: int = 0, last: int = 4) -> RowGroup:
    return RowGroup(first, last, [Row()], [0])


def test_sessions_that_are_about_to_be_back_are_waited_for() -> None:
    scene = Scene()
    one, two = session(), session()
    for _ in range(2):  # both are away for 20 ms
        scene.step(one)
        scene.step(two)
        assert scene.run() == [one, two]
        scene.now += 0.02
    scene.step(one)
    assert one.away_s == pytest.approx(0.02)
    scene.queue.ready.clear()
    assert scene.queue.patience_s() == 0, "there is nothing that could run"
    scene.queue.ready.append(one)
    assert 0 < scene.queue.patience_s() < 0.08
    scene.now += 1
    assert scene.queue.patience_s() == 0, "it is gone"


def test_a_session_is_away_only_between_its_steps() -> None:
    scene = Scene()
    one, two = session(), session()
    for _ in range(2):
        scene.step(one)
        scene.step(two)
        scene.run()
        scene.now += 0.02
    scene.step(one)
    scene.queue.remove(two)
    assert scene.queue.patience_s() == 0, "who was closed doesn't come back"
    scene.step(one)
    assert scene.run() == [one]
    away_s = one.away_s
    scene.step(one)
    assert one.away_s == away_s, "its next step was here when it was answered"
    prefilled = session()
    scene.step(prefilled, columns=20)
    while prefilled not in scene.run():
        pass
    scene.step(prefilled)
    assert prefilled.away_s is None, "after a prefill it isn't known when a session comes"


def test_sessions_run_in_their_order_and_ranges_take_turns() -> None:
    scene = Scene()
    here, there = [session() for _ in range(3)], session(1, 4)
    works = [scene.step(one) for one in [*here, there]]
    again = scene.step(here[0])
    scene.queue.requeue(here[1])
    assert [take.work for take in scene.queue.plan()] == [works[0], works[2], works[1]]
    assert [take.session for take in scene.queue.plan()] == [there]
    scene.queue.drop_first(here[0])
    assert [take.work for take in scene.queue.plan()] == [works[2], works[1], again]
    assert scene.queue.remove(here[0]) == [again]
    assert scene.queue.remove(here[0]) == []
    assert list(scene.queue.ready) == [here[2], there, here[1]]


def test_nothing_to_plan() -> None:
    assert StepQueue(64).plan() == []
    assert StepQueue(64).patience_s() == 0


def test_a_long_prefill_is_cut_where_a_deterministic_session_may_be() -> None:
    queue = StepQueue(100, deterministic=True)
    queue.add(session(), StepWork(torch.zeros(1, 90, 4), 10, None, None, Future()))
    assert [take.columns for take in queue.plan()] == [90]
    queue.add(session(), StepWork(torch.zeros(1, 90, 4), 10, None, None, Future()))
    queue.requeue(queue.ready[0])
    assert [take.columns for take in queue.plan()] == [90], "what is left is less than up to the next multiple of 64"
