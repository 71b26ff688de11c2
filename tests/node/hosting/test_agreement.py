"""A node that would serve something else under the same name as the others is refused, before it joins them."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import UsageError
from swarm.node.hosting.agreement import disagreements, require_agreement
from swarm.wire.records import Offer, ServerInfo, ServerState
from swarm.wire.rpc import INFO, handle_name
from tests.loopback import LoopbackP2P

MINE = Offer(fingerprint="shape", manifest="root", adapters={"poet": "1"})


def check(
    theirs: Offer | None, *, mine: Offer = MINE, state: ServerState = ServerState.JOINING, who: str = "you"
) -> dict[str, str]:
    return disagreements([{}, {who: ServerInfo(state, 1.0, offer=theirs)}], "me", mine, "m")


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
    (found,) = check(theirs).values()
    assert re.search(says, found)
    assert not check(theirs, state=ServerState.OFFLINE)
    assert not check(theirs, who="me")  # an earlier life's record


def test_nodes_that_do_not_say_are_let_in() -> None:
    assert not check(None)  # Petals
    assert not check(Offer())
    assert not check(dataclasses.replace(MINE, manifest="other"), mine=dataclasses.replace(MINE, manifest=""))
    assert not check(dataclasses.replace(MINE, adapters={"cook": "2"}))


def test_only_who_is_there_is_believed() -> None:
    async def run() -> None:
        async def answer(peer_id: PeerID, request: Any) -> Any:
            return runtime_pb2.ExpertInfo()

        there = LoopbackP2P({}, {handle_name(INFO): answer})
        nobody = LoopbackP2P({}, {})
        await require_agreement(nobody, {PeerID(b"nobody"): "wrong"})  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="wrong"):
            await require_agreement(there, {PeerID(b"somebody"): "wrong"})  # type: ignore[arg-type]

    asyncio.run(run())
