"""Names of pages say all that their content depends on, however a session came there."""

from __future__ import annotations

import torch
from hivemind.p2p import PeerID
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.routing.route import Leg
from swarm.client.session.prefix import PageNames, column_digests, describe_context
from swarm.network.dht import RemoteSpan
from swarm.wire.records import ServerInfo, ServerState
from swarm.wire.rpc import MAX_NAMES, NAME_BYTES, NAMED_TOKENS

ROWS = 3
PADDING = (0, 5, 17)


def names_of(hidden: torch.Tensor, padding: tuple[int, ...]) -> list[bytes] | None:
    """All names of a session that took ``hidden`` in one step."""
    names = PageNames(padding)
    names.extend(0, column_digests(hidden), None)
    return names.between(0, hidden.shape[1])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40),
            st.none() | st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS),
            st.none() | st.integers(0, 100),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_names_are_those_of_what_the_rows_hold_now(steps: list[tuple[int, list[int] | None, int | None, bool]]) -> None:
    names, held, padding = PageNames(PADDING), torch.empty(ROWS, 0, 2), torch.tensor(PADDING)
    for number, (columns, order, crop_to, fails) in enumerate(steps):
        if crop_to is not None and crop_to <= held.shape[1]:
            held = held[:, :crop_to]
        start = held.shape[1]
        hypo_ids = None if order is None else torch.tensor(order)
        hidden = torch.full((ROWS, columns, 2), float(number)) + torch.randn(ROWS, columns, 2)
        before = names.copy()
        names.extend(start, column_digests(hidden), hypo_ids)
        if fails:
            names = before
            continue
        if hypo_ids is not None:
            held, padding = held[hypo_ids], padding[hypo_ids]
        held = torch.cat([held, hidden], dim=1)
        assert names.between(0, held.shape[1]) == names_of(held, tuple(padding.tolist()))
        parts = [names.between(0, start) or [b""] * ROWS, names.between(start, held.shape[1]) or [b""] * ROWS]
        whole = names.between(0, held.shape[1]) or [b""] * ROWS
        assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_padding_is_not_in_the_names_and_everything_before_is() -> None:
    hidden = torch.randn(1, 64, 8)
    shifted = torch.cat([torch.randn(1, 7, 8), hidden], dim=1)
    plain, padded = names_of(hidden, (0,)), names_of(shifted, (7,))
    assert plain == padded
    assert plain is not None
    assert len(plain[0]) == 64 // NAMED_TOKENS * NAME_BYTES
    hidden[0, 20, 3] += 1e-6  # in the second page
    other = names_of(hidden, (0,))
    assert other is not None
    assert other[0][:NAME_BYTES] == plain[0][:NAME_BYTES]
    for page in range(1, 4):
        at = slice(page * NAME_BYTES, (page + 1) * NAME_BYTES)
        assert other[0][at] != plain[0][at]


def test_a_message_never_has_more_names_than_a_node_takes() -> None:
    rows = 100
    names = PageNames((0,) * rows)
    names.extend(0, [[b"x" * NAME_BYTES] * (60 * NAMED_TOKENS) for _ in range(rows)], None)
    found = names.between(0, 60 * NAMED_TOKENS)
    assert found is not None
    assert sum(map(len, found)) <= MAX_NAMES * NAME_BYTES


def leg(start: int, end: int, *, peer: bytes = b"a", dtype: str = "float32", quantized: str = "none") -> Leg:
    info = ServerInfo(ServerState.ONLINE, 1.0, torch_dtype=dtype, quant_type=quantized)
    return Leg(RemoteSpan(PeerID(b"\x12 " + peer * 32), start, end, info), start, end)


def test_a_context_depends_on_all_that_the_inputs_of_a_hop_depend_on() -> None:
    def contexts(*legs: Leg, salt: bytes = b"s", model: str = "m", dtype: torch.dtype = torch.float32) -> list[bytes]:
        return describe_context(salt, (model, "shape"), dtype, legs)

    first, second = contexts(leg(0, 3), leg(3, 6))
    assert contexts(leg(0, 4), leg(4, 6))[0] == first, "what a hop does itself is no input of it"
    others = [
        contexts(leg(0, 3), leg(3, 6), salt=b"t"),
        contexts(leg(0, 3), leg(3, 6), model="n"),
        contexts(leg(0, 3), leg(3, 6), dtype=torch.bfloat16),
        contexts(leg(0, 3, dtype="bfloat16"), leg(3, 6)),
        contexts(leg(0, 3, quantized="int8"), leg(3, 6)),
        contexts(leg(0, 3, peer=b"b"), leg(3, 6)),
        contexts(leg(0, 1), leg(1, 3), leg(3, 6))[1:],
    ]
    assert all(one != second for _, one in others)
    assert all(one != first for one, _ in others[:3])
