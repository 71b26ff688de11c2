"""A node that would serve something else under the same name as the others is refused, before it joins them."""

from __future__ import annotations

import dataclasses

import pytest

from swarm.errors import UsageError
from swarm.node.hosting.agreement import require_agreement
from swarm.wire.records import Offer, ServerInfo, ServerState

MINE = Offer(fingerprint="shape", manifest="root", adapters={"poet": "1"})


def check(
    theirs: Offer | None, *, mine: Offer = MINE, state: ServerState = ServerState.JOINING, who: str = "you"
) -> None:
    require_agreement([{}, {who: ServerInfo(state, 1.0, offer=theirs)}], "me", mine, "m")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fingerprint": "other"}, "serves a model of another shape as 'm'"),
        ({"manifest": "other"}, r"serves other weights \(manifest other, here root\) as 'm'"),
        ({"adapters": {"poet": "2"}}, "serves another adapter as 'poet'"),
    ],
)
def test_what_differs_is_named(fields: dict[str, object], says: str) -> None:
    theirs = dataclasses.replace(MINE, **fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=says):
        check(theirs)
    check(theirs, state=ServerState.OFFLINE)
    check(theirs, who="me")  # an earlier life's record


def test_nodes_that_do_not_say_are_let_in() -> None:
    check(None)  # Petals
    check(Offer())
    check(dataclasses.replace(MINE, manifest="other"), mine=dataclasses.replace(MINE, manifest=""))
    check(dataclasses.replace(MINE, adapters={"cook": "2"}))
