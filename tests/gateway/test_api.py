"""The API as OpenAI's own client sees it; texts equal transformers' on the whole model."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.gateway.conftest import Api, Whole, ask
from tests.swarm_e2e.nodes import Swarm, run_command

PROMPT = "This method returns"
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": COLOURS, "strict": True},
}


# models


def test_models(api: Api) -> None:
    assert [(model.id, (model.model_extra or {}).get("parent")) for model in api.client.models.list()] == [
        ("demo", None),
        ("painter", "demo"),
    ]
    assert api.client.models.retrieve("demo").owned_by == "swarm"
    with pytest.raises(openai.NotFoundError) as error:
        api.client.models.retrieve("gpt/4")
    assert error.value.code == "model_not_found"


# completions


def test_a_completion_is_transformers_own_text(api: Api, whole: Whole) -> None:
    done = api.client.completions.with_raw_response.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0)
    made = done.parse()
    assert made.choices[0].text == whole.greedy(PROMPT, 40)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(whole.tokenizer(PROMPT)["input_ids"]), 40)
    extra = made.usage.model_extra or {}
    assert extra["queue_seconds"] >= 0
    assert extra["first_token_seconds"] > 0
    assert extra["tokens_per_second"] > 0
    route = done.headers["x-swarm-route"]
    assert route.isascii()
    assert [hop[-5:] for hop in route.split(" -> ")] == ["[0:4]", "[4:8]"]


def test_an_adapter_is_a_model(api: Api, whole: Whole) -> None:
    """The base model and the adapter, at the same time."""

    def ask_for(model: str) -> str:
        made = api.client.completions.create(model=model, prompt=PROMPT, max_tokens=30, temperature=0)
        assert made.model == model
        return made.choices[0].text

    with ThreadPoolExecutor(2) as threads:
        plain, adapted = threads.map(ask_for, ("demo", "painter"))
    assert plain == whole.greedy(PROMPT, 30)
    assert adapted == whole.adapted().greedy(PROMPT, 30)
    assert adapted != plain
    base, own = (api.client.embeddings.create(model=each, input=PROMPT).data[0] for each in ("demo", "painter"))
    assert base.embedding != own.embedding


@pytest.mark.parametrize("through", ["swarm", "gateway"])
def test_the_command_takes_an_adapter(api: Api, swarm: Swarm, whole: Whole, through: str) -> None:
    where = ["--initial-peers", *swarm.initial_peers] if through == "swarm" else ["--api", api.url]
    argv = ["swarm", "generate", "demo", "--adapter", "painter", "-p", PROMPT, "--max-new-tokens", "20", "--json"]
    done = run_command([*argv, *where])
    assert done.returncode == 0, done.stderr
    assert whole.adapted().greedy(PROMPT, 20) in json.loads(done.stdout)["text"]


def test_a_text_that_ends_by_itself(api: Api, whole: Whole) -> None:
    eos = whole.tokenizer.eos_token_id
    options: Any = {"logit_bias": {str(eos): 100}}
    made = api.client.completions.create(model="demo", prompt=PROMPT, temperature=0, **options)
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("", "stop")
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **options}
    forced = api.post("/completions", body).json()
    assert forced["choices"][0]["finish_reason"] == "length"
    assert forced["usage"]["completion_tokens"] == 3


def test_prompts_of_all_kinds_and_many_choices(api: Api, whole: Whole) -> None:
    texts = [PROMPT, "def main():", "A list is"]
    ids = [whole.tokenizer(text)["input_ids"] for text in texts]
    right = [whole.greedy(text, 8) for text in texts]
    for prompts in (texts, ids):
        made = api.client.completions.create(model="demo", prompt=prompts, n=2, max_tokens=8, temperature=0)
        assert [choice.text for choice in made.choices] == [text for text in right for _ in range(2)]
        assert [choice.index for choice in made.choices] == list(range(6))
    one = api.client.completions.create(model="demo", prompt=ids[1], max_tokens=8, temperature=0, echo=True)
    assert one.choices[0].text == texts[1] + right[1]


def test_thirty_two_at_once_give_each_the_same_as_alone(api: Api, whole: Whole) -> None:
    texts = [f"{PROMPT} {number}" for number in range(32)]
    right = [whole.greedy(text, 12 + number % 5) for number, text in enumerate(texts)]

    def run(number: int) -> str:
        options: Any = {"model": "demo", "prompt": texts[number], "max_tokens": 12 + number % 5, "temperature": 0}
        if number % 2:
            return api.client.completions.create(**options).choices[0].text
        return "".join(each.choices[0].text for each in api.client.completions.create(stream=True, **options))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(run, range(32))) == right


def test_a_seed_gives_the_same_text_whatever_else_runs(api: Api) -> None:
    def run(seed: int, n: int = 1) -> list[str]:
        made = api.client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=16, temperature=0.9, seed=seed, n=n
        )
        return [choice.text for choice in made.choices]

    alone = [run(seed)[0] for seed in range(6)]
    assert len(set(alone)) > 3
    with ThreadPoolExecutor(6) as pool:
        assert [texts[0] for texts in pool.map(run, range(6))] == alone
    assert run(0, n=3) == alone[:3], "choice i has the seed + i"


def test_stop_strings(api: Api, whole: Whole) -> None:
    text = whole.greedy(PROMPT, 40)
    stop = text[20:26]
    made = api.client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stop=["\0", stop])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    stream = api.client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(each.choices[0].text for each in stream) == text[: text.index(stop)]


def test_options_that_change_the_text_are_transformers_own(api: Api, whole: Whole) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "repetition_penalty": 1.5}
    assert api.post("/completions", body).json()["choices"][0]["text"] == whole.greedy(
        PROMPT, 24, repetition_penalty=1.5
    )
    # of one token to sample from, whatever the temperature
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        hot = {**body, "repetition_penalty": 1.0, "temperature": 1.7, **narrow}
        assert api.post("/completions", hot).json()["choices"][0]["text"] == whole.greedy(PROMPT, 24)
    penalised = api.post("/completions", {**body, "repetition_penalty": 1.0, "frequency_penalty": 2.0}).json()
    assert penalised["choices"][0]["text"] != whole.greedy(PROMPT, 24)


def test_logprobs_of_completions(api: Api, whole: Whole) -> None:
    made = api.client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3)
    told = made.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == made.choices[0].text
    ids = whole.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        right = whole.model(ids).logits[0, -1].log_softmax(dim=-1).topk(3)
    assert told.top_logprobs is not None
    assert told.token_logprobs is not None
    assert list(told.top_logprobs[0]) == [whole.tokenizer.decode([token]) for token in right.indices.tolist()]
    torch.testing.assert_close(torch.tensor(list(told.top_logprobs[0].values())), right.values, atol=1e-3, rtol=1e-3)
    assert told.token_logprobs[0] == pytest.approx(float(right.values[0]), abs=1e-3)
    assert told.text_offset == [sum(map(len, told.tokens[:n])) for n in range(5)]


# chat


def test_chat_is_the_models_template_and_transformers_text(api: Api, whole: Whole) -> None:
    right = whole.greedy(whole.chat_prompt("What is a list?"), 20)
    messages = ask("What is a list?")
    made = api.client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=20, temperature=0)
    assert made.choices[0].message.content == right
    stream = api.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == right
    assert chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) != ([], None)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == made.usage.completion_tokens  # type: ignore[union-attr]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_of_chat(api: Api) -> None:
    options: Any = {"model": "demo", "messages": ask("What is a list?"), "max_tokens": 6, "temperature": 0}
    made = api.client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    told = made.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert b"".join(bytes(each.bytes or ()) for each in told.content).decode() == made.choices[0].message.content
    assert all(each.top_logprobs[0].logprob == each.logprob for each in told.content)
    assert all(len(each.top_logprobs) == 2 for each in told.content)
    chunks = api.client.chat.completions.create(**options, logprobs=True, stream=True)
    streamed = [
        each.token
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for each in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == [each.token for each in told.content]


def test_many_choices_in_a_stream(api: Api) -> None:
    options: Any = {"model": "demo", "messages": ask("Hi"), "n": 3, "seed": 4, "temperature": 1.0, "max_tokens": 8}
    texts = ["", "", ""]
    for chunk in api.client.chat.completions.create(stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    made = api.client.chat.completions.create(**options)
    assert texts == [choice.message.content for choice in made.choices]
    assert len(set(texts)) > 1


# structured output and tools


def check_colours(text: str | None) -> None:
    made = json.loads(text or "")
    assert made.keys() == {"colour", "count"}
    assert made["colour"] in ("red", "blue")
    assert 1 <= made["count"] <= 99


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_of_a_schema(api: Api, temperature: float) -> None:
    made = api.client.chat.completions.create(
        model="demo",
        messages=ask("A colour and a count, please."),
        temperature=temperature,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}},
    )
    assert made.choices[0].finish_reason == "stop"
    check_colours(made.choices[0].message.content)


def test_any_json(api: Api) -> None:
    made = api.client.chat.completions.create(
        model="demo",
        messages=ask("JSON, please."),
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_object"},
    )
    text = made.choices[0].message.content or ""
    assert text.startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_tool_that_has_to_be_called(api: Api, choice: Any) -> None:
    options: Any = {"model": "demo", "messages": ask("Paint it."), "tools": [TOOL], "tool_choice": choice, "seed": 1}
    made = api.client.chat.completions.create(**options)
    assert made.choices[0].finish_reason == "tool_calls"
    (call,) = made.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "paint"
    check_colours(call.function.arguments)
    chunks = list(api.client.chat.completions.create(**options, stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    calls = [tool for chunk in chunks for tool in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(tool.function.arguments or "" for tool in calls if tool.function) == call.function.arguments


def test_a_tool_that_may_be_called_and_is_not(api: Api, whole: Whole) -> None:
    options: Any = {"model": "demo", "messages": ask("Hi"), "tools": [TOOL], "max_tokens": 8, "temperature": 0}
    made = api.client.chat.completions.create(**options).choices[0]
    assert made.message.tool_calls is None
    chunks = api.client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == made.message.content
    call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": "{}"}}
    answered = {"role": "tool", "tool_call_id": "1", "content": "done"}
    after = [*ask("Hi"), {"role": "assistant", "tool_calls": [call]}, answered]
    api.client.chat.completions.create(**{**options, "messages": after})


# embeddings and responses


def test_embeddings_are_the_mean_of_the_last_hidden_states(api: Api, whole: Whole) -> None:
    texts = ["A list of items", "def main():"]
    ids = [whole.tokenizer(text)["input_ids"] for text in texts]
    for given in (texts, ids):
        made = api.client.embeddings.create(model="demo", input=given)  # base64 unless asked otherwise
        for one, prompt in zip(made.data, ids, strict=True):
            with torch.no_grad():
                hidden = whole.model.model(torch.tensor([prompt])).last_hidden_state[0]
            right = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
            torch.testing.assert_close(torch.tensor(one.embedding), right, atol=1e-3, rtol=1e-3)
    floats = api.client.embeddings.create(model="demo", input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(made.data[0].embedding, abs=1e-5)
    assert floats.usage.prompt_tokens == len(ids[0])


def test_responses(api: Api, whole: Whole) -> None:
    right = whole.greedy(whole.chat_prompt("What is a list?"), 16)
    options: Any = {"model": "demo", "input": "What is a list?", "temperature": 0, "max_output_tokens": 16}
    made = api.client.responses.create(**options)
    assert made.output_text == right
    assert made.usage is not None
    assert made.usage.output_tokens == 16
    assert made.status == "incomplete"
    with api.client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response() if events[-1].type == "response.completed" else events[-1].response  # type: ignore[union-attr]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == right
    assert final.output_text == right
    listed = api.client.responses.create(**{**options, "input": [{"role": "user", "content": "What is a list?"}]})
    assert listed.output_text == right
    with pytest.raises(openai.BadRequestError, match="not kept"):
        api.client.responses.create(**options, previous_response_id="resp_1")


# other programs


def test_curl(api: Api, whole: Whole) -> None:
    body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{api.url}/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    assert "".join(texts) == whole.greedy(PROMPT, 8)
