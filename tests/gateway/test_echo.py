"""``echo`` with ``logprobs``, as programs that evaluate models ask for them: equal to transformers' own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.gateway.conftest import Api, Whole

TEXTS = [
    "This method returns the first",
    "def main():",
    "Ünïcödé — 日本 🎉 ends here",
    "A " + "long list of items " * 40,
]


def right_logprobs(whole: Whole, ids: list[int], count: int) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Of each token but the first: its own log-probability, the likeliest ids in its place, and theirs."""
    with torch.no_grad():
        logprobs = whole.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    best = logprobs.topk(count, dim=-1)
    own = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return own, best.indices.tolist(), best.values


def check(whole: Whole, told: dict[str, Any], ids: list[int], count: int) -> None:
    """``ids`` are all tokens that ``told`` speaks of."""
    own, best, values = right_logprobs(whole, ids, count)
    assert told["tokens"] == [whole.tokenizer.decode([token]) for token in ids]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(told["token_logprobs"][1:]), own, atol=2e-3, rtol=1e-3)
    for at, top in enumerate(told["top_logprobs"][1:]):
        texts = [whole.tokenizer.decode([token]) for token in best[at]]
        assert set(top) == {*texts, told["tokens"][at + 1]}
        for text, value in zip(texts, values[at].tolist(), strict=True):
            assert top[text] >= value - 2e-3, "of tokens that look alike, the likeliest"
        assert max(top.values()) == pytest.approx(float(values[at, 0]), abs=2e-3)
        # programs find out by equality whether the token was the likeliest
        assert (told["token_logprobs"][at + 1] == max(top.values())) == (ids[at + 1] == best[at][0])


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_logprobs_of_prompts(api: Api, whole: Whole, as_ids: bool, max_tokens: int) -> None:
    ids = [whole.tokenizer(text)["input_ids"] for text in TEXTS]
    body = {"model": "demo", "prompt": ids if as_ids else TEXTS, "max_tokens": max_tokens, "temperature": 0}
    answer = api.post("/completions", {**body, "echo": True, "logprobs": 3, "seed": 1234})
    assert answer.status_code == 200, answer.text
    made = answer.json()
    for choice, text, prompt in zip(made["choices"], TEXTS, ids, strict=True):
        new = [int(right_logprobs(whole, prompt, 1)[1][-1][0])] * max_tokens
        check(whole, choice["logprobs"], prompt + new, 3)
        assert choice["text"] == text + whole.tokenizer.decode(new, skip_special_tokens=True)
        assert choice["finish_reason"] == "length"
        told = choice["logprobs"]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            special = token in whole.tokenizer.all_special_tokens
            assert special or "\ufffd" in token or choice["text"][offset : offset + len(token)] == token
        assert told["text_offset"] == sorted(told["text_offset"])
    assert made["usage"]["completion_tokens"] == max_tokens * len(TEXTS)


def test_as_a_stream(api: Api, whole: Whole) -> None:
    body = {"model": "demo", "prompt": TEXTS[0], "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}
    kept = api.post("/completions", body).json()["choices"][0]
    lines = api.post("/completions", {**body, "stream": True}).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(choice["text"] for choice in choices) == kept["text"]
    for name, values in kept["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][name]] == values
    ids = whole.tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        made = whole.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist()
    check(whole, kept["logprobs"], made, 2)


def test_a_prompt_of_one_token_and_one_that_fills_the_context(api: Api, whole: Whole) -> None:
    one = {"model": "demo", "prompt": [7], "max_tokens": 0, "echo": True, "logprobs": 1}
    told = api.post("/completions", one).json()["choices"][0]["logprobs"]
    assert (told["token_logprobs"], told["top_logprobs"], told["text_offset"]) == ([None], [None], [0])
    most = api.get("/v1/models").json()["data"][0]["max_model_len"]
    full = {**one, "prompt": [7 + number % 50 for number in range(most)]}
    told = api.post("/completions", full).json()["choices"][0]["logprobs"]
    check(whole, told, full["prompt"], 1)
    assert api.post("/completions", {**full, "max_tokens": 1}).status_code == 400
    assert api.post("/completions", {**one, "echo": False}).status_code == 400, "it would give nothing"
