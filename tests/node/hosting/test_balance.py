"""Nodes that move to where the swarm needs them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.node.hosting.placement.balance import better_start, covered_by_others
from swarm.wire.records import ServerInfo, ServerState

COUNT = 8
Node = tuple[int, int, float]  # first block, number of blocks, throughput

nodes = st.lists(
    st.integers(1, COUNT).flatmap(
        lambda count: st.tuples(st.integers(0, COUNT - count), st.just(count), st.floats(0.1, 1000))
    ),
    min_size=1,
    max_size=7,
)


def covered(swarm: list[Node]) -> list[float]:
    return [sum(speed for start, count, speed in swarm if start <= block < start + count) for block in range(COUNT)]


def move(swarm: list[Node], number: int, quality: float) -> bool:
    """Lets a node have its turn; whether it moves."""
    start, count, speed = swarm[number]
    others = covered(swarm[:number] + swarm[number + 1 :])
    to = better_start(others, others, start, count, speed, quality)
    if to is not None:
        swarm[number] = (to, count, speed)
    return to is not None


@given(nodes, st.floats(0.1, 1.0))
def test_nodes_that_move_in_turn_come_to_rest_and_leave_no_hole(swarm: list[Node], quality: float) -> None:
    turns = idle = moves = 0
    while idle < len(swarm):
        before = covered(swarm)
        moved = move(swarm, turns % len(swarm), quality)
        turns += 1
        idle, moves = (0, moves + 1) if moved else (idle + 1, moves)
        after = covered(swarm)
        assert all(now > 0 for was, now in zip(before, after, strict=True) if was > 0)
        assert not moved or sorted(after) > sorted(before)
        assert moves < 200


@given(nodes, nodes)
def test_what_is_not_up_yet_is_relied_on_by_nobody(swarm: list[Node], joining: list[Node]) -> None:
    """Blocks that others are only about to serve aren't left."""
    start, count, speed = swarm[0]
    online, planned = covered(swarm[1:]), covered(swarm[1:] + joining)
    to = better_start(online, planned, start, count, speed, 1.0)
    if to is not None:
        assert all(online[block] or to <= block < to + count for block in range(start, start + count))


def test_one_of_two_moves_to_the_hole() -> None:
    swarm = [(0, 4, 10.0), (0, 4, 10.0)]
    assert move(swarm, 1, 0.75)
    assert swarm == [(0, 4, 10.0), (4, 4, 10.0)]
    assert not move(swarm, 0, 0.75)
    assert not move(swarm, 1, 0.75)


def test_a_small_gain_is_not_worth_a_move() -> None:
    swarm = [(0, 8, 90.0), (0, 4, 10.0)]  # 100 and 90
    assert not move(swarm, 1, 0.85)
    swarm = [(0, 8, 10.0), (0, 4, 6.0), (0, 4, 6.0)]  # 22 and 10: with a move, 16 and 16
    assert not move(swarm, 1, 0.5)
    assert move(swarm, 1, 0.75)


def test_records_of_nodes_that_moved_or_left_are_void() -> None:
    def info(state: ServerState, speed: float, start: int, end: int) -> ServerInfo:
        return ServerInfo(state, speed, start_block=start, end_block=end)

    online, joining, gone = ServerState.ONLINE, ServerState.JOINING, ServerState.OFFLINE
    records = [
        {"me": info(online, 9.0, 0, 4), "moved": info(online, 5.0, 1, 2), "new": info(joining, 0.0, 0, 1)},
        {"moved": info(online, 5.0, 1, 2), "left": info(gone, 7.0, 1, 2)},
        {"petals": ServerInfo(online, 3.0)},
        {},
    ]
    assert covered_by_others(records, "me") == [1.0, 5.0, 3.0, 0.0]
    assert covered_by_others(records, "me", unknown=4.0) == [4.0, 5.0, 3.0, 0.0]
    assert covered_by_others(records, "me", min_state=online) == [0.0, 5.0, 3.0, 0.0]
