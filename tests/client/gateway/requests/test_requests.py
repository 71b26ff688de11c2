"""How requests are read, and in what words they are refused."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from swarm.client.gateway.decode.admission import Admission
from swarm.client.gateway.decode.sampling import SamplingParams
from swarm.client.gateway.errors import ApiError
from swarm.client.gateway.event_log import EventLog
from swarm.client.gateway.requests.parse import parse
from swarm.client.gateway.requests.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    Tool,
)
from swarm.client.gateway.text.tool_calls import plan_tools

HI = [{"role": "user", "content": "Hi"}]
KINDS = "has to be a string, a list of strings, a list of token ids, or a list of such lists"


@pytest.mark.parametrize(
    ("schema", "fields", "says"),
    [
        (CompletionRequest, {"prompt": "a", "stop": list("abcde")}, "stop: List should have at most 4 items"),
        (CompletionRequest, {"prompt": "a", "stop": 5}, "stop: has to be a string or a list of strings"),
        (CompletionRequest, {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
        (CompletionRequest, {"prompt": [[1], ["a"]]}, "prompt.1.0: Input should be a valid integer"),
        (CompletionRequest, {"prompt": ["a", 1]}, "prompt.1: Input should be a valid string"),
        (CompletionRequest, {"prompt": {}}, f"prompt: {KINDS}"),
        (CompletionRequest, {}, "prompt: is missing"),
        (EmbeddingRequest, {"input": None}, f"input: {KINDS}"),
        (ChatRequest, {"messages": [{"role": "user", "content": [1]}]}, "messages.0.content: has to be a string or"),
        (ChatRequest, {"messages": [1]}, "messages.0: has to be an object"),
        (ChatRequest, {"messages": HI, "tool_choice": "x"}, "tool_choice: Input should be 'none', 'auto' or"),
        (ChatRequest, {"messages": HI, "logit_bias": {str(n): 1 for n in range(2000)}}, "at most 1024"),
        (ResponsesRequest, {"input": 1}, "input: has to be a string or a list of messages"),
    ],
)
def test_errors_speak_of_what_was_given(schema: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(schema, json.dumps({"model": "demo", **fields}).encode())
    assert says in str(refused.value)
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == says.partition(":")[0].partition(".")[0] or "at most" in says


@pytest.mark.parametrize("text", [b'"\\ud83d"', b'"\\udc00 x"', b'"\xed\xa0\xbd"', b'{"deep": "\\ud83d"}', b"NaN"])
def test_what_is_no_text_and_no_number_is_no_json(text: bytes) -> None:
    with pytest.raises(ApiError, match="not JSON"):
        parse(CompletionRequest, b'{"model": "demo", "prompt": "a", "user": ' + text + b"}")


def test_characters_of_two_halves_and_a_mark_in_front() -> None:
    made = parse(CompletionRequest, b'\xef\xbb\xbf{"model": "demo", "prompt": "\\ud83d\\ude00"}')
    assert made.prompt == "😀"


def test_a_long_list_is_read_up_to_its_first_error() -> None:
    with pytest.raises(ApiError, match=r"prompt\.1:"):
        parse(CompletionRequest, json.dumps({"model": "demo", "prompt": [1, *["x"] * 200_000]}).encode())


def test_what_never_fits_is_not_for_later() -> None:
    admission = Admission(2, 3)
    admission.check(5)
    with pytest.raises(ApiError, match="at most 5 at a time") as refused:
        admission.check(6)
    assert refused.value.status == 400
    assert "Retry-After" not in refused.value.headers


def test_a_tool_without_parameters_is_called_without_arguments() -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    for parameters in (None, {}, {"type": "object"}, {"type": "object", "properties": {}, "required": []}):
        tool = Tool(type="function", function={"name": "now", "parameters": parameters})  # type: ignore[arg-type]
        schema = plan_tools([tool], "required").schema
        assert schema is not None
        assert schema["properties"]["arguments"] == nothing
    for parameters in ({"additionalProperties": True}, {"$ref": "#/x"}, {"required": ["a"]}):
        tool = Tool(type="function", function={"name": "now", "parameters": parameters})  # type: ignore[arg-type]
        schema = plan_tools([tool], "required").schema
        assert schema is not None
        assert schema["properties"]["arguments"] == parameters


def test_a_temperature_that_float32_cannot_divide_by_is_0() -> None:
    made = parse(CompletionRequest, b'{"model": "demo", "prompt": "a", "temperature": 1e-30}')
    assert made.params(SamplingParams()).temperature == 0


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    reading, writing = os.pipe()
    log = EventLog(writing)
    log({"event": "ready", "text": "é"})
    assert os.read(reading, 99) == '{"event": "ready", "text": "é"}\n'.encode()
    for _ in range(20_000):  # more than the pipe and the queue have room for
        log({"event": "request", "text": "x" * 50})
    os.close(reading)
    log.close()
    os.close(writing)
