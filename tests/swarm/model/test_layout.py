"""Which blocks belong together, and what travels between them, by the config alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.model.layout import carried_size, check_range, group_of, inner_boundaries, kv_sources, parse_blocks


def config(kinds: str, shared: int, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        num_hidden_layers=len(kinds), layer_types=list(kinds), num_kv_shared_layers=shared, hidden_size=64, **fields
    )


def test_the_last_of_each_type_is_shared() -> None:
    gemma = config("ssssfssssfssssf", 5)  # sliding and full
    assert kv_sources(gemma) == {10: 8, 11: 8, 12: 8, 13: 8, 14: 9}
    assert inner_boundaries(gemma) == set(range(9, 15))
    assert group_of(11, inner_boundaries(gemma)) == (8, 15)


def test_most_models_share_nothing() -> None:
    llama = SimpleNamespace(num_hidden_layers=4, hidden_size=64)
    assert not kv_sources(llama)
    assert not inner_boundaries(llama)
    assert carried_size(llama) == 64
    assert carried_size(config("ssf", 0, hidden_size_per_layer_input=0)) == 64
    assert carried_size(config("ssf", 0, hidden_size_per_layer_input=8)) == 64 + 3 * 8
    assert carried_size(config("ssf", 0, hidden_size_per_layer_input=8, altup_num_inputs=4)) == 4 * 64 + 3 * 8


@given(st.text("sf", min_size=2, max_size=12), st.integers(0, 10))
def test_a_range_that_is_allowed_has_all_that_its_blocks_need(kinds: str, shared: int) -> None:
    if set(kinds) - set(kinds[: max(0, len(kinds) - shared)]):
        return  # nothing to share for some type: transformers refuses such a config
    sources, inner = kv_sources(config(kinds, shared)), inner_boundaries(config(kinds, shared))
    for start in range(len(kinds)):
        for end in range(start + 1, len(kinds) + 1):
            cut = any((source < bound <= block) for block, source in sources.items() for bound in (start, end))
            if not cut:
                check_range(start, end, inner)
                assert all(sources.get(block, block) >= start for block in range(start, end))
                continue
            with pytest.raises(UsageError, match=f"blocks {start}:{end} can't be used without those around them"):
                check_range(start, end, inner)


def test_blocks_are_given_as_a_range_within_the_model() -> None:
    assert parse_blocks(" 3:9", 12) == (3, 9)
    for wrong in ("", "3", "3:", "9:3", "3:3", "0:13", "-1:3", "a:b", "1:2:3"):
        with pytest.raises(UsageError, match="blocks"):
            parse_blocks(wrong, 12)
