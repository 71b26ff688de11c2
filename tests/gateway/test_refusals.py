"""Requests that are wrong get the status and words that OpenAI's clients know; what is merely unknown is ignored."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Api, ask

LONG = "context_length_exceeded"
IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "?"}}}


def chat(**fields: Any) -> tuple[str, Any]:
    return "/chat/completions", {"model": "demo", "messages": ask("Hi"), **fields}


def completion(**fields: Any) -> tuple[str, Any]:
    return "/completions", {"model": "demo", "prompt": "Hi", **fields}


@pytest.mark.parametrize(
    ("request_", "status", "param", "code"),
    [
        (chat(model="gpt-4"), 404, "model", "model_not_found"),
        (chat(messages=None), 400, "messages", None),
        (chat(messages=[]), 400, "messages", None),
        (chat(messages=IMAGE), 400, "messages", None),
        (chat(messages=ask("long " * 3000)), 400, "messages", LONG),
        (chat(temperature=-1), 400, "temperature", None),
        (chat(n=0), 400, "n", None),
        (chat(stop=list("abcde")), 400, "stop", None),
        (chat(top_logprobs=3), 400, "top_logprobs", None),
        (chat(logit_bias={"99999": 1}), 400, "logit_bias", None),
        (chat(tool_choice="required"), 400, "tool_choice", None),
        (chat(response_format=NO_SCHEMA), 400, "response_format", None),
        (completion(max_tokens=99999), 400, "max_tokens", LONG),
        (completion(max_tokens="many"), 400, "max_tokens", None),
        (completion(prompt=[]), 400, "prompt", None),
        (completion(prompt=[5000]), 400, "prompt", None),
        (completion(suffix="!"), 400, "suffix", None),
        (completion(best_of=3), 400, "best_of", None),
        (completion(max_tokens=0), 400, "max_tokens", None),
        (completion(prompt=["Hi"] * 20, n=100), 400, None, "too_many_texts"),
        (chat(messages=ask("Hi"), top_logprobs=21), 400, "top_logprobs", None),
        (("/responses", {"model": "demo", "input": "Hi", "text": {"format": 5}}), 400, "text.format", None),
        (("/embeddings", {"model": "demo", "input": []}), 400, "input", None),
        (("/embeddings", {"model": "demo", "input": "Hi", "dimensions": 3}), 400, "dimensions", None),
        (("/responses", {"model": "demo", "input": []}), 400, "input", None),
        (("/nothing", {}), 404, None, "unknown_url"),
    ],
)
def test_errors(api: Api, request_: tuple[str, Any], status: int, param: str | None, code: str | None) -> None:
    path, body = request_
    for extra in ({}, {"stream": True}):
        answer = api.post(path, {**body, **extra})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
        assert error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"demo"', b"\xff", b"[" * 100_000, b'{"model":{}}'])
def test_bodies_that_are_no_requests(api: Api, body: bytes) -> None:
    answer = httpx.post(api.url + "/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_fields_are_ignored(api: Api) -> None:
    body = {"model": "demo", "messages": ask("Hi"), "max_tokens": 1, "frobnicate": {"a": 1}, "user": "me"}
    assert api.post("/chat/completions", body).status_code == 200
