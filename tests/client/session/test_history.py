"""What a hop was sent, put together again as the rows are now."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.session.history import History

ROWS = 3


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.none() | st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS),
            st.none() | st.integers(0, 12),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_replay_is_what_a_cache_that_is_really_reordered_holds(
    steps: list[tuple[int, list[int] | None, int | None, bool]],
) -> None:
    history, held, origin = History(), torch.empty(ROWS, 0, 1), torch.arange(ROWS)
    for number, (columns, order, crop_to, fails) in enumerate(steps):
        if crop_to is not None and crop_to <= held.shape[1]:
            history.crop(crop_to)
            held = held[:, :crop_to]
        hypo_ids = None if order is None else torch.tensor(order)
        hidden = torch.full((ROWS, columns, 1), float(number)) + torch.arange(ROWS)[:, None, None] / 10
        history.append(held.shape[1], hidden, hypo_ids)
        if fails:
            history.take_back()
            continue
        if hypo_ids is not None:
            held, origin = held[hypo_ids], origin[hypo_ids]
        held = torch.cat([held, hidden], dim=1)
    replayed, order_now = history.replay(ROWS)
    assert torch.equal(order_now, origin)
    assert torch.equal(torch.empty(ROWS, 0, 1) if replayed is None else replayed, held)
