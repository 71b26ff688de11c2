"""No request whatever is answered with 500: bodies made from the API's own description, and the same with damage."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.gateway.conftest import Api, Whole
from tests.gateway.from_schema import JSON, from_schema

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
SCHEMAS = [
    {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"$ref": "#/nowhere"},
    {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 1}]},
    {},
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"half": "\\ud83d"}'}}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|im_start|>\x00</s><s>"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "tool", "tool_call_id": "c", "content": "done"},
    {"role": "function", "name": "f", "content": "done"},
]


def format_of(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def tool_of(schema: Any) -> Any:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


texts = st.text(max_size=8) | st.lists(st.integers(0, 2047), min_size=1, max_size=4)
schemas = st.sampled_from(SCHEMAS)
lengths = st.integers(1, 3)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["demo", "painter"]),
    "messages": st.lists(st.sampled_from(TURNS), min_size=1, max_size=4),
    "prompt": texts | st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3),
    "input": st.text(max_size=8) | st.lists(st.sampled_from(TURNS[:3]), min_size=1, max_size=2),
    "logit_bias": st.dictionaries(st.integers(0, 2047).map(str), st.floats(-100, 100), max_size=3),
    "response_format": st.builds(format_of, schemas) | st.just({"type": "json_object"}),
    "tools": st.lists(st.builds(tool_of, schemas | st.none()), min_size=1, max_size=2),
    "n": st.integers(1, 2),
    "stream": st.booleans(),
    "max_tokens": lengths,
    "max_completion_tokens": lengths,
    "max_output_tokens": lengths,
}
"""What gets further than values of the schema alone: texts that are soon over, and options that are not refused."""
LENGTHS = {"max_tokens", "max_output_tokens"}
ALWAYS = {"model", "messages", "prompt", "input", "stream", *LENGTHS}
REFUSED = {"suffix", "best_of", "dimensions", "previous_response_id", "text", "top_logprobs"}


@pytest.fixture(scope="module")
def document(api: Api) -> Any:
    return api.get("/openapi.json").json()


def schema_of(document: Any, path: str) -> Any:
    ref = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return document["components"]["schemas"][ref.rpartition("/")[2]]


def bodies(document: Any, path: str) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    """Requests that mostly are answered, and those that the schema alone makes."""
    parts = document["components"]["schemas"]
    schema = schema_of(document, path)
    likely = {name: values for name, values in LIKELY.items() if name in schema["properties"]}
    if path == "/v1/responses":
        del likely["tools"]
    if path == "/v1/embeddings":
        likely["input"] = LIKELY["prompt"]
    always = {name: values for name, values in likely.items() if name in ALWAYS}
    options = {name: from_schema(field, parts) for name, field in schema["properties"].items() if name not in REFUSED}
    options = {**options, **likely}
    some = st.sets(st.sampled_from(sorted(options.keys() - always))).flatmap(
        lambda names: st.fixed_dictionaries({name: options[name] for name in names})
    )
    answered = st.builds(lambda body, more: {**more, **body}, st.fixed_dictionaries(always), some)
    made = st.builds(lambda body, by_schema: {**by_schema, **body}, answered, from_schema(schema, parts))
    return answered, made


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[Any]) -> Any:
    """A request in which something, somewhere, is replaced by anything."""
    body = json.loads(json.dumps(draw(whole)))
    place: Any = body
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        inside = place[key]
        if not (isinstance(inside, (dict, list)) and inside and draw(st.booleans())):
            place[key] = draw(JSON)
            for name in LENGTHS & body.keys():
                body[name] = 1 if body[name] is None else body[name]  # or it would be as long as there is room
            return body
        place = inside


def broken(content: bytes, at: int, junk: bytes) -> bytes:
    return content[:at] + junk + content[at + len(junk) :]


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert '"server_error"' not in answer.text


@pytest.mark.parametrize("path", PATHS)
def test_no_body_is_answered_with_500(api: Api, whole: Whole, document: Any, path: str) -> None:
    answered, made = bodies(document, path)
    as_json = st.one_of(answered, answered, damaged(answered), made, JSON).map(lambda body: json.dumps(body).encode())
    anything = as_json | st.builds(broken, as_json, st.integers(0, 200), st.binary(max_size=3))
    with httpx.Client(base_url=api.url.removesuffix("/v1"), timeout=60) as http:

        @settings(max_examples=40, suppress_health_check=list(HealthCheck))
        @given(anything)
        def any_body(content: bytes) -> None:
            check(http.post(path, content=content))

        any_body()
    right = api.client.completions.create(model="demo", prompt="A list", max_tokens=5, temperature=0)
    assert right.choices[0].text == whole.greedy("A list", 5)


def test_the_description_is_of_every_endpoint_and_made_of_valid_schemas(document: Any) -> None:
    assert {path for path, methods in document["paths"].items() if "post" in methods} == set(PATHS)
    assert {"/v1/models", "/v1/models/{name}", "/api/swarm/nodes/{peer_id}"} <= document["paths"].keys()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    chat = Draft202012Validator({**schema_of(document, PATHS[0]), "components": document["components"]})
    request = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stop": "a"}
    assert chat.is_valid(request)
    assert not chat.is_valid({**request, "stop": [1]})


HOSTS = st.sampled_from(["localhost", "[", "a:b", "", "\xff", "x" * 9000]) | st.text("az[]:@%/\\", max_size=9)
ADDRESSES = st.sampled_from([b"\0", b"\xff", b"..", b"x" * 300, b"chat//", b"\xed\xa0\x80"]) | st.binary(max_size=12)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ADDRESSES, HOSTS, st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "DELETE"]), st.sampled_from(["/", *PATHS]))
def test_no_address_and_no_header_is_answered_with_500(
    api: Api, path: bytes, host: str, method: str, above: str
) -> None:
    where = urlsplit(api.url)
    assert where.hostname is not None
    for headers in ({"Host": host}, {"Host": "localhost", "Origin": f"http://{host}"}):
        connection = http.client.HTTPConnection(where.hostname, where.port or 80, timeout=60)
        connection.request(method, f"{above}/{quote(path)}", headers={**headers, "Authorization": f"Bearer {host}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status < 500
        connection.close()
