"""Position embeddings that are kept are those that are made on the spot, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from swarm.compute.kept_positions import TOGETHER, KeptPositions


def positions(start: int, count: int = 1) -> torch.Tensor:
    return torch.arange(start, start + count)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_are_the_same(dtype: torch.dtype) -> None:
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=80, num_attention_heads=4))  # 20: no power of two
    kept, hidden = KeptPositions(), torch.zeros(1, 1, 80, dtype=dtype)
    for start in (0, 1, 7, 255, 256, 700, 4001, 10**5, 3):
        for count in (1, 5, 40):
            mine = kept.get(start, positions(start, count), lambda where: rotary(hidden, where))
            for one, other in zip(mine, rotary(hidden, positions(start, count)), strict=True):
                assert torch.equal(one, other)


def test_nothing_is_made_beyond_the_end_of_a_table() -> None:
    table = torch.arange(TOGETHER + 5)
    kept = KeptPositions(end=len(table))
    for start in (0, 7, TOGETHER, TOGETHER + 4):
        assert kept.get(start, positions(start), lambda where: (table[where],))[0].tolist() == [[start]]


def test_each_stretch_is_made_once_and_few_are_kept() -> None:
    made: list[int] = []

    def make(where: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        made.append(int(where[0, 0]))
        return {"full": (where[..., None].float(),)}

    kept = KeptPositions()
    for start in range(2 * TOGETHER):
        assert kept.get(start, positions(start), make)["full"][0].item() == start
    assert made == [0, TOGETHER]
    for number in range(100):
        kept.get(number * TOGETHER, positions(number * TOGETHER), make)
    assert len(kept._kept) < 20


@pytest.mark.parametrize("made", [None, torch.ones(3, 1, TOGETHER), (torch.ones(1, 7, 4),), "something else"])
def test_what_has_no_place_for_positions_is_made_each_time(made: Any) -> None:
    kept = KeptPositions()
    for start in (4, 5):
        assert kept.get(start, positions(start), lambda where: made) is made


def test_slopes_that_no_position_changes_stay_as_they_are() -> None:
    slopes, kept = torch.ones(8), KeptPositions()
    assert kept.get(9, positions(9), lambda where: slopes) is slopes
