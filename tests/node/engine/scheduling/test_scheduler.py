"""Decode isn't held up by prefill, nobody starves, and a turn keeps to its budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.node.engine.scheduling.pacing import Pacer
from swarm.node.engine.scheduling.scheduler import Waiting, plan_turn

ALL = (0, 4)
WORK = st.builds(
    Waiting,
    blocks=st.sampled_from([(0, 2), (0, 4), (2, 4)]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    alone=st.booleans(),
)


@given(st.lists(WORK, min_size=1, max_size=12), st.integers(1, 64), st.integers(1, 64))
def test_a_turn_keeps_to_its_rules(waiting: list[Waiting], budget: int, prefill_budget: int) -> None:
    turn = plan_turn(waiting, budget=budget, prefill_budget=prefill_budget)
    assert turn is not None
    taken = [waiting[index] for index, _ in turn.takes]
    assert taken
    assert len({index for index, _ in turn.takes}) == len(taken)
    assert all(work.blocks == turn.blocks for work in taken)
    assert all(1 <= columns <= waiting[index].columns for index, columns in turn.takes)
    assert len(taken) == 1 or not any(work.alone for work in taken)
    tokens = sum(waiting[index].rows * columns for index, columns in turn.takes)
    assert tokens <= budget or (len(taken) == 1 and turn.takes[0][1] == 1)


@given(st.lists(WORK, min_size=1, max_size=8), st.integers(1, 64))
def test_everybody_gets_done(waiting: list[Waiting], budget: int) -> None:
    left = list(waiting)
    previous = None
    for _ in range(1 + sum(work.columns for work in waiting)):
        turn = plan_turn(left, budget=budget, prefill_budget=budget, previous=previous)
        if turn is None:
            break
        previous = turn.blocks
        rest = [work for index, work in enumerate(left) if index not in dict(turn.takes)]
        for index, columns in turn.takes:
            work = left[index]
            if columns < work.columns:
                rest.append(Waiting(work.blocks, work.rows, work.columns - columns, work.alone))
        left = rest
    assert not left


def test_decode_goes_along_with_a_piece_of_a_long_prefill() -> None:
    waiting = [Waiting(ALL, 1, 10_000), Waiting(ALL, 1, 1), Waiting(ALL, 2, 1)]
    turn = plan_turn(waiting, budget=512, prefill_budget=100)
    assert turn is not None
    assert turn.takes == ((1, 1), (2, 1), (0, 100))


def test_prefill_gets_its_share_among_many_decodes() -> None:
    waiting = [Waiting(ALL, 1, 1) for _ in range(100)] + [Waiting(ALL, 1, 50)]
    turn = plan_turn(waiting, budget=40, prefill_budget=40)
    assert turn is not None
    assert (100, 10) in turn.takes
    assert len(turn.takes) == 31


def test_only_so_many_decode_together_unless_prefill_waits() -> None:
    waiting = [Waiting(ALL, 1, 1) for _ in range(10)]
    turn = plan_turn(waiting, budget=64, prefill_budget=64, together=4)
    assert turn is not None
    assert [index for index, _ in turn.takes] == [0, 1, 2, 3]
    turn = plan_turn([*waiting, Waiting(ALL, 1, 50)], budget=64, prefill_budget=20, together=4)
    assert turn is not None
    assert len(turn.takes) == 11


def test_ranges_take_turns() -> None:
    waiting = [Waiting((0, 2), 1, 1), Waiting((2, 4), 1, 1), Waiting((0, 4), 1, 1)]
    previous = None
    seen = []
    for _ in range(3):
        turn = plan_turn(waiting, budget=8, prefill_budget=8, previous=previous)
        assert turn is not None
        previous = turn.blocks
        seen.append(previous)
    assert seen == [(0, 2), (0, 4), (2, 4)]


def test_nothing_waits() -> None:
    assert plan_turn([], budget=8, prefill_budget=8) is None


def test_prefill_is_cut_only_while_somebody_decodes() -> None:
    now = 0.0
    pacer = Pacer(512, target_s=0.25, share=1.0, quiet_s=1.0, clock=lambda: now)
    assert pacer.prefill_budget() == 512
    pacer.ran(prefill=500, decode=0, seconds=5.0)
    assert pacer.prefill_budget() == 512
    pacer.ran(prefill=0, decode=1, seconds=1.0)
    assert pacer.prefill_budget() == 25, "a quarter of a second"
    for _ in range(50):
        pacer.ran(prefill=0, decode=8, seconds=0.2)
    assert pacer.prefill_budget() == 20, "one decode step more for those who decode"
    assert pacer.prefill_budget(decoding=0) == 512, "those who did are gone"
    assert pacer.prefill_budget(prefilling=1, decoding=8) == 20
    assert pacer.prefill_budget(prefilling=9, decoding=8) == 22, "more wait for prefill"
    assert pacer.prefill_budget(prefilling=80, decoding=8) == 25, "but never more than a quarter of a second"
    for _ in range(50):
        pacer.ran(prefill=20, decode=8, seconds=0.3)  # of which 0.2 are for decode
    assert pacer.prefill_budget() == 40
    now = 2.0
    assert pacer.prefill_budget() == 512
