"""Sampling equals transformers' processors, and a row's token doesn't depend on what else is in the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm.client.gateway.decode.sampling import Row, SamplingParams, adjust, distribution, invert, sample, top_logprobs

VOCABULARY = 600  # more than what top-p looks at first

options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9, 50.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.99999, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def theirs(params: SamplingParams, prompt: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``[1, vocabulary]`` probabilities as transformers' generate makes them."""
    chain: list[Any] = []
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    scores: torch.Tensor = LogitsProcessorList(chain)(prompt, logits.clone())
    return scores.softmax(dim=-1)


@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 2**31))
def test_distribution_equals_transformers_row_by_row(params: list[SamplingParams], seed: int) -> None:
    logits = logits_of(len(params), seed)
    prompts = torch.randint(0, VOCABULARY, (len(params), 20), generator=torch.Generator().manual_seed(seed))
    rows = [Row(each, set(prompt.tolist())) for each, prompt in zip(params, prompts, strict=True)]
    ours = distribution(adjust(logits, rows), params)
    for index, each in enumerate(params):
        right = theirs(each, prompts[index : index + 1], logits[index : index + 1])[0]
        other = (ours[index] > 0) != (right > 0)
        # where sums of many small numbers decide (top_p near 1), a few of the smallest more or less are rounding
        assert (ours[index] + right)[other].sum() <= (5e-6 if each.top_p > 0.999 else 0)
        torch.testing.assert_close(ours[index], right, atol=2e-5, rtol=1e-4)


@given(st.lists(options, min_size=2, max_size=6), st.lists(st.floats(0, 0.999999), min_size=6, max_size=6))
def test_a_row_gets_the_same_token_alone_and_in_a_batch(params: list[SamplingParams], draws: list[float]) -> None:
    logits = logits_of(len(params), 5)
    rows = [Row(each, {1, 2}, draw=draw) for each, draw in zip(params, draws, strict=False)]
    rows[0] = Row(SamplingParams(temperature=0))
    together = sample(logits, rows).tolist()
    assert together == [int(sample(logits[i : i + 1], rows[i : i + 1])) for i in range(len(rows))]
    assert together[0] == int(logits[0].argmax())


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_a_draw_never_gives_a_token_of_probability_zero(draw: float, seed: int) -> None:
    probabilities = torch.rand(1, 50, generator=torch.Generator().manual_seed(seed))
    probabilities[probabilities < 0.7] = 0
    probabilities[0, 3] = 0.5
    token = int(invert(probabilities, torch.tensor([draw], dtype=torch.float64)))
    assert probabilities[0, token] > 0
    assert draw == 0 or probabilities[0, : token + 1].sum() / probabilities.sum() > draw - 1e-5


def test_samples_have_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    draws = torch.rand(40_000, generator=torch.Generator().manual_seed(3)).tolist()
    counts = Counter(sample(logits, [Row(SamplingParams(), draw=draw) for draw in draws]).tolist())
    expected = logits[0].softmax(dim=0)
    for token in range(4):
        assert counts[token] / 40_000 == pytest.approx(float(expected[token]), abs=0.01)


def test_penalties_and_biases_as_openai_defines_them() -> None:
    logits = torch.zeros(2, 8)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 3.0, 5: -1.0})
    rows = [Row(params, {1, 2, 3}, {2: 1, 3: 4}), Row(SamplingParams())]
    assert adjust(logits, rows)[0].tolist() == [0, 0, -0.75, -1.5, 0, -1, 0, 3]
    assert adjust(logits, rows)[1].tolist() == [0] * 8
    assert logits.abs().sum() == 0


def test_grammars_leave_only_what_they_allow() -> None:
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[4, 9]] = True
    logits = logits_of(2, 1)
    for temperature in (0.0, 2.0):
        for draw in (0.01, 0.5, 0.99999):
            params = SamplingParams(temperature=temperature, logit_bias={11: 100.0})
            masked, free = sample(logits, [Row(params, allowed=allowed, draw=draw), Row(params, draw=draw)]).tolist()
            assert masked in (4, 9)
            assert free == 11


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(2, 4)
    own, ids, values = top_logprobs(logits, torch.tensor([5, 6]), 3)
    expected = logits.log_softmax(dim=-1)
    assert own.tolist() == [float(expected[0, 5]), float(expected[1, 6])]
    assert torch.equal(ids[0], expected[0].argsort(descending=True)[:3])
    assert torch.equal(values[0], expected[0][ids[0]])
