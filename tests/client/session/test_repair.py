"""Repairing a route, over hops without a network that show by their sums whether they know all that was before."""

from __future__ import annotations

import asyncio

import pytest
import torch

from swarm.client.routing.route import Leg
from swarm.client.routing.step_times import StepTimes
from swarm.client.session import failures as failures_module
from swarm.client.session.failures import Failures
from swarm.client.session.pipeline import Pipeline
from swarm.client.session.repair import InputsMissing, replay
from swarm.client.settings import ClientSettings
from swarm.errors import BadRequestError, OutOfCacheError, SwarmError
from tests.client.routing.test_routing import span
from tests.client.session.fakes import FakeHop, FakeView, lost

ROWS, WIDTH = 2, 4
INPUTS = torch.arange(ROWS * 10.0).reshape(ROWS, 10, 1)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures_module, "_FULL_RETRY_SECONDS", 0.0)


def make(name: str, start: int = 0, end: int = 4) -> FakeHop:
    return FakeHop(Leg(span(name, start, end), start, end))


def repair(
    failed: FakeHop, routes: list[list[FakeHop]], view: FakeView | None = None, *, handed_over: bool = False
) -> list[FakeHop]:
    async def alive(_: FakeHop) -> bool:
        return False

    async def run() -> list[FakeHop]:
        settings = ClientSettings(silence=0.05)
        pipeline: Pipeline[FakeHop] = Pipeline(settings, alive, StepTimes())

        async def open_hops(order: torch.Tensor) -> list[FakeHop]:
            orders.append(order.tolist())
            return routes.pop(0)

        failures = Failures(view or FakeView([]), settings)
        return await replay(failed, ROWS, pipeline, failures, open_hops, lambda hops: WIDTH, handed_over=handed_over)

    orders: list[list[int]] = []
    return asyncio.run(run())


def test_the_history_goes_into_all_hops_in_pieces() -> None:
    failed, first, second = make("a"), make("b", 0, 2), make("c", 2, 4)
    failed.history.append(0, INPUTS, None)
    assert repair(failed, [[first, second]]) == [first, second]
    assert first.seen == second.seen == [(0, 4), (4, 4), (8, 2)]
    history, _ = second.history.replay(ROWS)
    assert history is not None
    assert torch.equal(history, INPUTS.cumsum(dim=1))  # the outputs of the hop before it are its inputs


def test_rows_are_as_beams_have_reordered_them() -> None:
    failed, other = make("a"), make("b")
    failed.history.append(0, INPUTS[:, :3], None)
    failed.history.append(3, INPUTS[:, 3:4], torch.tensor([1, 1]))
    repair(failed, [[other]])
    expected = torch.cat([INPUTS[[1, 1], :3], INPUTS[:, 3:4]], dim=1)
    history, _ = other.history.replay(ROWS)
    assert history is not None
    assert torch.equal(history, expected)


def test_a_hop_that_has_had_nothing_needs_nothing() -> None:
    other = make("b")
    assert repair(make("a"), [[other]]) == [other]
    assert other.seen == []


@pytest.mark.parametrize("error", [lost(), OutOfCacheError("full"), BadRequestError("too long")])
def test_others_are_tried_while_they_fail_too(error: SwarmError) -> None:
    failed, bad, good = make("a"), make("b"), make("c")
    failed.history.append(0, INPUTS, None)
    bad.broken = error
    assert repair(failed, [[bad], [good]]) == [good]
    assert bad.ended == "abandoned"
    assert good.ended == ""


def test_a_silent_one_is_a_lost_one() -> None:
    failed, bad, good = make("a"), make("b"), make("c")
    failed.history.append(0, INPUTS, None)
    bad.silent = True
    view = FakeView([])
    assert repair(failed, [[bad], [good]], view) == [good]
    assert set(view.left_out) == {bad.peer_id}


def test_a_second_refusal_is_raised_and_nothing_stays_open() -> None:
    failed, hops = make("a"), [make("b"), make("c")]
    failed.history.append(0, INPUTS, None)
    for hop in hops:
        hop.broken = BadRequestError("too long")
    with pytest.raises(BadRequestError):
        repair(failed, [[hop] for hop in hops])
    assert [hop.ended for hop in hops] == ["abandoned", "abandoned"]


def test_inputs_that_were_never_sent() -> None:
    failed = make("a")
    failed.history.skip(4)
    with pytest.raises(InputsMissing):
        repair(failed, [])


def took_over(name: str, columns: int, start: int = 0, end: int = 4) -> FakeHop:
    """It has the first columns of ``INPUTS``."""
    hop = make(name, start, end)
    hop.reused, hop._columns = columns, INPUTS[:, :columns]
    return hop


def test_what_was_handed_over_is_not_sent_again() -> None:
    failed, other = make("a"), took_over("b", 7)
    failed.history.append(0, INPUTS, None)
    assert repair(failed, [[other]], handed_over=True) == [other]
    assert other.seen == [(7, 3)]
    history, _ = other.history.replay(ROWS)
    assert history is not None
    assert torch.equal(history, INPUTS)


def test_hops_go_on_from_the_first_column_that_one_of_them_has_not() -> None:
    failed, first, second = make("a"), took_over("b", 10, 0, 2), took_over("c", 6, 2, 4)
    failed.history.append(0, INPUTS, None)
    repair(failed, [[first, second]], handed_over=True)
    assert first.seen == second.seen == [(6, 4)]
    assert (first.history.missing, second.history.missing) == (0, 6)
    assert (first.history.position, second.history.position) == (10, 10)


def test_nothing_is_sent_where_all_was_handed_over() -> None:
    failed, first, second = make("a"), took_over("b", 10, 0, 2), took_over("c", 10, 2, 4)
    failed.history.append(0, INPUTS, None)
    repair(failed, [[first, second]], handed_over=True)
    assert first.seen == second.seen == []
    assert second.history.replay(ROWS)[0] is None
    assert (second.history.missing, second.history.position) == (10, 10)


def test_columns_that_nobody_asked_for_are_not_believed_in() -> None:
    failed, other = make("a"), took_over("b", 7)
    failed.history.append(0, INPUTS, None)
    repair(failed, [[other]])
    assert other.seen[0] == (0, 4)


@pytest.mark.parametrize("columns", [3, 4])
def test_inputs_that_were_never_sent_are_handed_over_or_missing(columns: int) -> None:
    failed, other = make("a"), took_over("b", columns)
    failed.history.skip(4)
    failed.history.append(4, INPUTS[:, 4:], None)
    if columns < 4:
        with pytest.raises(InputsMissing):
            repair(failed, [[other]], handed_over=True)
        assert other.ended == "abandoned"
    else:
        repair(failed, [[other]], handed_over=True)
        assert other.seen == [(4, 4), (8, 2)]
        assert other.history.missing == 4
