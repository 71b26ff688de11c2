"""Whose an error is, what is done about it, and what is said of nodes that can't be used."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm import errors
from swarm.client.checks import check_hidden, check_hypo_ids
from swarm.client.routing.left_out import LeftOut, Needs, Seen, explain
from swarm.client.routing.swarm_view import SwarmView
from swarm.client.session.divided import _divide_order
from swarm.client.session.failures import Course, Failures, course
from swarm.client.settings import ClientSettings
from swarm.errors import Owner, SwarmError
from swarm.wire.error_text import from_wire, to_wire
from swarm.wire.limits import divide_rows
from swarm.wire.records import Offer, ServerInfo, ServerState
from tests.client.routing.test_routing import peer, span

CALLER, NODE = errors.BadRequestError("not for anybody"), errors.RemoteError("answered nonsense")


def classes(root: type[SwarmError] = SwarmError, depth: int = 0) -> Iterator[tuple[int, str, str]]:
    yield depth, root.__name__, root.owner.value
    for child in root.__subclasses__():
        yield from classes(child, depth + 1)


def test_the_tree_at_the_head_of_the_file_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^( *)(\w+Error) +(\w+)  ", errors.__doc__, re.MULTILINE)
    assert sorted((len(indent) // 2, name, owner) for indent, name, owner in drawn) == sorted(classes())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.BadRequestError("x"), Course.ASK_ANOTHER),
        (errors.UsageError("x"), Course.ASK_ANOTHER),
        (errors.MalformedError("x"), Course.LEAVE_OUT),
        (errors.NotServedError("x"), Course.LEAVE_OUT),
        (errors.RemoteError("x"), Course.LEAVE_OUT),
        (errors.LeavingError("x"), Course.LEAVE_OUT),
        (errors.PeerLostError("x"), Course.LEAVE_OUT),
        (errors.OutOfCacheError("x"), Course.ASK_LATER),
        (errors.EvictedError("x"), Course.ASK_AGAIN),
        (errors.OutOfOrderError("x"), Course.ASK_AGAIN),
        (errors.DaemonError("x"), Course.RAISE),
    ],
)
def test_only_errors_of_a_node_or_of_its_network_leave_it_out(error: SwarmError, expected: Course) -> None:
    assert course(error, refused_before=False, forgiven_before=False) is expected


def test_what_is_refused_twice_is_raised_and_who_evicts_twice_is_left_out() -> None:
    assert course(CALLER, refused_before=True, forgiven_before=False) is Course.RAISE
    assert course(NODE, refused_before=True, forgiven_before=False) is Course.LEAVE_OUT
    assert course(errors.EvictedError("x"), refused_before=False, forgiven_before=True) is Course.LEAVE_OUT


def test_what_a_peer_sent_that_cant_be_read_is_to_that_peer_a_bad_request() -> None:
    again = from_wire(to_wire(errors.MalformedError("no msgpack")))
    assert type(again) is errors.BadRequestError
    assert again.owner is Owner.CALLER


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Could not allocate 3 bytes immediately: out of memory", errors.OutOfCacheError),
        ("ValueError('Cannot allocate KV cache for 9000 tokens, max = 2048')", errors.BadRequestError),
        ("Task size greater than max_batch_size (2048), it can't be processed", errors.BadRequestError),
        ("[swarm:not_served] blocks 0:3 are not served here", errors.NotServedError),
    ],
)
def test_refusals_keep_their_owner_over_the_wire_also_those_of_petals(text: str, kind: type[SwarmError]) -> None:
    assert type(from_wire(text)) is kind


# the view, with records that are made up


def view_of(*spans: Any, **settings: Any) -> SwarmView:
    async def check_daemon() -> None:
        """It lives."""

    alive: Any = SimpleNamespace(check_daemon=check_daemon, restarts=0)
    view = SwarmView(alive, "demo", 8, "shape", ClientSettings(**settings))
    view._spans = spans
    return view


def info(**offer: Any) -> ServerInfo:
    return ServerInfo(ServerState.ONLINE, 1.0, offer=Offer(**offer))


def test_a_refusal_bans_nobody_and_the_second_one_is_the_last() -> None:
    one, two = span("one", 0, 8), span("two", 0, 8)
    view = view_of(one, two)
    failures = Failures(view, ClientSettings())
    asyncio.run(failures.met(one, CALLER))
    assert view._bans.why(one.peer_id) is None
    with pytest.raises(errors.BadRequestError) as raised:
        asyncio.run(failures.met(two, CALLER))
    assert raised.value is CALLER, "unchanged"
    assert view._bans.why(two.peer_id) is None
    asyncio.run(failures.met(one, NODE))
    why = view._bans.why(one.peer_id)
    assert why is not None
    assert "answered nonsense" in why


def test_what_broke_with_the_own_daemon_is_no_peers_fault() -> None:
    one, lost = span("one", 0, 8), errors.PeerLostError("the stream ended")
    view = view_of(one)
    failures = Failures(view, ClientSettings())
    view.peer.restarts = 1  # type: ignore[misc]
    asyncio.run(failures.met(one, lost))
    assert view._bans.why(one.peer_id) is None
    asyncio.run(failures.met(one, lost, restarts=0))
    assert view._bans.why(one.peer_id) is None
    asyncio.run(failures.met(one, lost, restarts=1))
    assert view._bans.why(one.peer_id) is not None


def test_refusals_of_different_blocks_are_no_two_refusals() -> None:
    failures = Failures(view_of(), ClientSettings())
    asyncio.run(failures.met(span("one", 0, 4), CALLER))
    asyncio.run(failures.met(span("two", 4, 8), CALLER))
    with pytest.raises(errors.BadRequestError):
        asyncio.run(failures.met(span("three", 3, 5), CALLER))


def test_who_refused_is_gone_around_and_if_there_is_nobody_else_asked_again() -> None:
    one, two = span("one", 0, 8), span("two", 0, 8)
    for _ in range(10):
        (leg,) = asyncio.run(view_of(one, two).route(0, 8, avoid={one.peer_id}))
        assert leg.peer_id == two.peer_id
    (leg,) = asyncio.run(view_of(one).route(0, 8, avoid={one.peer_id}))
    assert leg.peer_id == one.peer_id


def test_without_progress_work_waits_for_room_only_so_long() -> None:
    full, one = errors.OutOfCacheError("full"), span("one", 0, 8)
    failures = Failures(view_of(one), ClientSettings(wait_timeout=0.0))
    with pytest.raises(errors.OutOfCacheError):
        asyncio.run(failures.met(one, full))
    patient = Failures(view_of(one), ClientSettings(wait_timeout=60.0))
    asyncio.run(patient.met(one, full))
    before = patient.patience
    patient.progress(3)
    assert patient.patience >= before
    asyncio.run(patient.met(one, full))
    since = patient._full_since
    patient.progress(3)
    assert patient._full_since == since, "no further than before"


def test_limits_are_those_of_the_records() -> None:
    small = span("small", 0, 8)
    view = view_of(span("usual", 0, 4), small.__class__(small.peer_id, 0, 8, info(max_rows=16, max_step_tokens=100)))
    assert view.limits(0, 4).rows == 256
    assert (view.limits(0, 8).rows, view.limits(0, 8).tokens) == (16, 100)
    assert view.limits(0, 8).rows_of(40) == 2
    assert view.limits(0, 8).rows_of(101) == 0
    assert Needs(rows=17).unmet(info(max_rows=16)) == "takes up to 16 rows, and 8192 tokens in a message"
    assert Needs(columns=3000).unmet(ServerInfo(ServerState.ONLINE, 1.0)) is not None, "a server of Petals"
    assert Needs(columns=3000).unmet(info()) is None


# what is said


def seen(*left_out: LeftOut, **fields: Any) -> str:
    values: dict[str, Any] = {"blocks": (4, 5), "model": "demo", "needs": Needs(), "waited": 60.0, **fields}
    return explain(Seen(left_out=left_out, **values))


def test_nobody_there() -> None:
    assert seen(skews=(0.1,)) == (
        "nobody serves blocks 4:6 of demo, waited 60 s: start a node for them (swarm-node serve … --blocks 4:6) or "
        "raise wait_timeout"
    )


def test_somebody_there_who_cant_be_used() -> None:
    node = LeftOut("Qm12345678", "bee", 4, 8, "banned for 3 s more after: unreachable at /ip4/10.0.0.1/tcp/9")
    assert seen(node).startswith(
        "nobody serves blocks 4:6 of demo that can be used, waited 60 s: …12345678 'bee' (4:8) banned for 3 s more "
        "after: unreachable at /ip4/10.0.0.1/tcp/9. "
    )
    many = seen(*[node] * 11)
    assert many.count("'bee'") == 8
    assert "and 3 more" in many


def test_the_clock_and_the_network() -> None:
    assert "the clock of this machine is 90 s ahead" in seen(skews=(90.0, 91.0))
    assert "clock" not in seen(skews=(90.0, 0.2)), "one peer's clock is off"
    assert "no peer of the swarm answers" in seen(skews=())


def test_each_reason_why_a_node_is_left_out() -> None:
    good = span("good", 0, 4)
    make = good.__class__
    view = view_of(make(peer("banned"), 4, 8, info()), make(peer("small"), 4, 8, info(max_rows=16)))
    view._unusable = (
        make(peer("shape"), 4, 8, info(fingerprint="another")),
        make(peer("loads"), 4, 8, ServerInfo(ServerState.JOINING, 1.0, offer=Offer())),
    )
    view.failed(peer("banned"), errors.PeerLostError("unreachable at /ip4/10.0.0.1/tcp/9"))
    whys = [node.why for node in view._left_out((5,), Needs(rows=17))]
    for why, pattern in zip(
        whys,
        (
            r"banned for 3 s more after: unreachable at /ip4/10.0.0.1/tcp/9",
            "takes up to 16 rows",
            "another shape",
            "still loading",
        ),
        strict=True,
    ):
        assert re.search(pattern, why)


# the caller's input


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(2, 8),
        torch.zeros(2, 3, 9),
        torch.zeros(2, 3, 8, dtype=torch.int64),
        torch.zeros(2, 0, 8),
        torch.full((2, 3, 8), float("nan")),
        torch.full((2, 3, 8), float("-inf"), dtype=torch.bfloat16),
        torch.zeros(3, 3, 8),
    ],
)
def test_what_no_node_would_take_is_found_here(hidden: torch.Tensor) -> None:
    check_hidden(torch.zeros(2, 3, 8), 8, rows=2)
    with pytest.raises(errors.InputError) as raised:
        check_hidden(hidden, 8, rows=2)
    assert isinstance(raised.value, ValueError)
    assert raised.value.owner is Owner.CALLER


def test_hypo_ids_are_rows() -> None:
    check_hypo_ids(None, 2)
    check_hypo_ids(torch.tensor([1, 1]), 2)
    for wrong in (torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(errors.InputError):
            check_hypo_ids(wrong, 2)


@given(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 12))
def test_rows_are_divided_evenly_and_keep_together(rows: int, most: int, together: int) -> None:
    if most < together:
        with pytest.raises(ValueError, match="together"):
            divide_rows(rows, most, together)
        return
    parts = divide_rows(rows, most, together)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < part.stop - part.start <= most and part.start % together == 0 for part in parts)
    groups = math.ceil(rows / together)
    assert len(parts) <= math.ceil(groups / (most // together)), "no more of them than needed"


def test_an_order_is_divided_unless_it_crosses() -> None:
    parts = divide_rows(6, 3, 3)
    first, second = _divide_order(torch.tensor([2, 0, 0, 5, 5, 3]), parts)
    assert first is not None
    assert second is not None
    assert (first.tolist(), second.tolist()) == ([2, 0, 0], [2, 2, 0])
    with pytest.raises(errors.InputError, match="rows 3:6 are in a session of their own"):
        _divide_order(torch.tensor([0, 1, 2, 2, 4, 5]), parts)
