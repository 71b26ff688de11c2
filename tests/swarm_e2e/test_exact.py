"""The same tokens and logits as transformers on the whole model, for each kind of route.

More families are in test_families.py and tests/petals; all of them, over engines without a network, in tests/families.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from tests.models import tiny_model
from tests.swarm_e2e.nodes import run_swarm

CASES = {
    "llama-gqa": ("0:1", "1:4", "4:6"),
    "falcon-180b": ("0:4", "2:6"),  # whichever way the route goes, it enters or leaves a span in its middle
}


@dataclass
class Pair:
    """The model in the swarm, and whole."""

    swarm: Any
    whole: PreTrainedModel
    hops: int


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    path = tiny_model(request.param, positions=2048)
    spans = CASES[request.param]
    with (
        run_swarm(path, spans) as swarm,
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model,
    ):
        yield Pair(model, AutoModelForCausalLM.from_pretrained(path), len(spans))


def prompts(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(rows * columns))


def left_padded(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = prompts(rows, columns), torch.ones(rows, columns, dtype=torch.int64)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def same(pair: Pair, ids: torch.Tensor, **options: Any) -> None:
    for name, value in (("pad_token_id", 0), ("eos_token_id", None)):
        options.setdefault(name, value)
    results = []
    for model in (pair.whole, pair.swarm):
        set_seed(7)
        results.append(model.generate(ids, **options))
    assert torch.equal(results[0], results[1])


def test_logits(pair: Pair) -> None:
    ids = prompts(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(pair.swarm(ids).logits, pair.whole(ids).logits, atol=1e-4, rtol=1e-4)


def test_logits_from_embeddings_and_of_parts(pair: Pair) -> None:
    ids = prompts(1, 9)
    embeddings = pair.whole.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = pair.whole(ids, output_hidden_states=True)
        torch.testing.assert_close(pair.swarm(inputs_embeds=embeddings).logits, expected.logits, atol=1e-4, rtol=1e-4)
        part = pair.swarm.blocks[1:4](expected.hidden_states[1])
    torch.testing.assert_close(part, expected.hidden_states[4], atol=1e-4, rtol=1e-4)


def test_greedy(pair: Pair) -> None:
    same(pair, prompts(1, 13), max_new_tokens=24, do_sample=False)
    route = pair.swarm.last_route
    assert [hop.start for hop in route] == [0, *(hop.end for hop in route[:-1])]
    assert route[-1].end == 6
    assert len(route) == pair.hops


def test_greedy_batch_with_left_padding(pair: Pair) -> None:
    ids, mask = left_padded(4, 11)
    same(pair, ids, attention_mask=mask, max_new_tokens=12, do_sample=False)


def test_seeded_sampling(pair: Pair) -> None:
    same(pair, prompts(2, 7), max_new_tokens=16, do_sample=True, temperature=0.9, top_p=0.95)


def test_beam_search(pair: Pair) -> None:
    ids, mask = left_padded(2, 8)
    same(pair, ids, attention_mask=mask, max_new_tokens=12, num_beams=4, num_return_sequences=2, do_sample=False)


def test_a_prompt_longer_than_a_chunk(pair: Pair) -> None:
    # the client's steps are of 512 tokens: three of them are under way at a time
    same(pair, prompts(1, 1100), max_new_tokens=3, do_sample=False)


def test_a_session_over_several_calls(pair: Pair) -> None:
    ids, more = prompts(1, 6), prompts(1, 5)
    first = pair.whole.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = pair.whole.generate(
        torch.cat([first, more], dim=1), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with pair.swarm.session(max_length=64):
        ids = pair.swarm.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = torch.cat([ids, more], dim=1)
        ids = pair.swarm.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ids, expected)
