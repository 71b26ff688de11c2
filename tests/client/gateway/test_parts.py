"""Queue, keys, limits, access, tools, templates and grammars by themselves."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swarm.client.gateway.access.access import LOOPBACK, Access
from swarm.client.gateway.access.guard import Guard
from swarm.client.gateway.access.key_desk import KeyDesk
from swarm.client.gateway.access.keys import Key, KeyStore, Usage
from swarm.client.gateway.access.rate_limits import RateLimits, Window
from swarm.client.gateway.decode.admission import ASKER, Admission
from swarm.client.gateway.errors import ApiError, as_api_error
from swarm.client.gateway.requests.schemas import Message, NamedTool, Tool
from swarm.client.gateway.text.grammar import GrammarFactory
from swarm.client.gateway.text.templates import PLAIN_TEMPLATE, render
from swarm.client.gateway.text.tool_calls import may_be_call, parse_call, plan_tools
from swarm.errors import MissingBlocksError, OutOfCacheError, UsageError
from swarm.model.source import resolve

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo").path)


# the queue


def test_the_queue_is_in_order_and_bounded() -> None:
    async def work() -> None:
        admission, order = Admission(2, 3), []

        async def session(name: int) -> None:
            await admission.acquire()
            order.append(name)

        tasks = []
        for name in range(5):
            admission.check(1)
            tasks.append(asyncio.ensure_future(session(name)))
            await asyncio.sleep(0)
        assert order == [0, 1]
        assert (admission.running, admission.waiting) == (2, 3)
        with pytest.raises(ApiError) as full:
            admission.check(1)
        assert full.value.status == 429
        assert int(full.value.headers["Retry-After"]) >= 1
        tasks[2].cancel()  # gives up while it waits
        await asyncio.wait({tasks[2]})
        admission.check(1)
        admission.release()
        await asyncio.sleep(0)
        assert order == [0, 1, 3]
        # cancelled in the very moment in which it gets its turn: the turn goes on to nobody, and isn't lost
        admission.release()
        tasks[4].cancel()
        await asyncio.wait({tasks[4]})
        assert (admission.running, admission.waiting) == (1, 0)
        admission.release()
        assert admission.running == 0

    asyncio.run(work())


def test_who_asks_for_much_does_not_keep_others_waiting() -> None:
    async def main() -> None:
        admission, order = Admission(1, 20), []
        await admission.acquire()

        async def work(asker: str, number: int) -> None:
            ASKER.set(asker)
            await admission.acquire()
            order.append(f"{asker}{number}")

        working = [asyncio.create_task(work("greedy", number)) for number in range(4)]
        await asyncio.sleep(0)
        working += [asyncio.create_task(work(asker, 0)) for asker in ("one", "two")]
        await asyncio.sleep(0)
        working[1].cancel()
        await asyncio.wait({working[1]})
        assert admission.waiting == 5
        for _ in range(5):
            admission.release()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.wait(working), 5)
        assert order == ["greedy0", "one0", "two0", "greedy2", "greedy3"]
        admission.release()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(main())


# keys and limits


def test_keys_are_hashed_found_counted_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.sqlite"
    store = KeyStore(file)
    key = store.add("alice", requests_per_minute=5)
    other = store.add("bob")
    assert key != other
    assert len(key) == len("sk-swarm-") + 64
    assert file.stat().st_mode & 0o077 == 0
    assert store.find(key) == Key("alice", 5, None)
    assert store.find(key[:-1] + ("0" if key[-1] != "0" else "1")) is None
    store.count({"alice": Usage(1, 10, 3)})
    store.count({"alice": Usage(1, 1, 1)})
    second = KeyStore(file)  # as the command line does while the gateway runs
    assert [(each.key.name, each.requests, each.prompt_tokens, each.completion_tokens) for each in second.list()] == [
        ("alice", 2, 11, 4),
        ("bob", 0, 0, 0),
    ]
    with pytest.raises(UsageError, match="already"):
        second.add("alice")
    second.remove("alice")
    assert store.find(key) is None
    with pytest.raises(UsageError, match="no key"):
        store.remove("alice")
    dump = "\n".join(sqlite3.connect(file).iterdump())
    assert other not in dump
    assert other.removeprefix("sk-swarm-") not in dump


def test_limits_per_minute() -> None:
    now = 0.0
    limits, key = RateLimits(lambda: now), Key("alice", 2, 100)
    limits.admit(key)
    limits.used("alice", 99)
    now = 10.0
    limits.admit(key)
    with pytest.raises(ApiError) as refused:
        limits.admit(key)
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "50"
    limits.admit(Key("bob", 2, 100))
    now = 60.0
    limits.used("alice", 150)
    now = 75.0
    with pytest.raises(ApiError, match="tokens per minute"):
        limits.admit(key)
    now = 121.0
    limits.admit(key)
    limits.admit(Key("alice", None, None))


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=30), st.integers(1, 200))
def test_a_window_says_when_there_is_room_again(uses: list[tuple[float, int]], limit: int) -> None:
    window, now = Window(), 0.0
    for gap, amount in uses:
        now += gap
        window.add(now, amount)
    wait = window.wait(now, limit)
    if wait > 0:
        assert window.wait(now + wait * 0.999, limit) > 0
    assert window.wait(now + wait + 1e-6, limit) == 0


# who is let in


def _status(access: Access, path: str, **headers: str) -> int:
    """What a request is answered with, 200 if it is let in."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": raw}
    asyncio.run(Guard(app, access, RateLimits())(scope, None, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example:8000"}, 403),  # a name that was pointed here
        ({}, 403),
        ({"Host": "[::1"}, 400),
        ({"Host": "localhost:x"}, 400),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://["}, 403),
        ({"Host": "localhost:8000", "Origin": "https://friend.example"}, 200),
    ],
)
def test_an_open_gateway_is_not_open_to_pages_of_others(headers: dict[str, str], status: int) -> None:
    guard = Access(hosts=LOOPBACK, cors_origins=("https://friend.example",))
    assert _status(guard, "/v1/models", **headers) == status


def test_keys_are_asked_for(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    key = store.add("alice")
    guard = Access(KeyDesk(store))
    assert _status(guard, "/v1/models") == 401
    assert _status(guard, "/v1/models", Authorization="Bearer wrong") == 401
    assert _status(guard, "/v1/models", Authorization=f"Basic {key}") == 401
    assert _status(guard, "/v1/models", Authorization=f"Bearer {key}", Host="any.example") == 200
    assert _status(guard, "/metrics") == 401
    assert _status(guard, "/healthz") == 200
    assert _status(guard, "/index.html") == 200


def test_errors_of_the_swarm_in_the_words_of_the_api() -> None:
    assert as_api_error(OutOfCacheError("full")).status == 429
    assert as_api_error(MissingBlocksError("gone", [1])).status == 503
    assert as_api_error(MissingBlocksError("gone", [1])).headers["Retry-After"] == "10"
    hidden = as_api_error(RuntimeError("a path /home/alice"))
    assert hidden.status == 500
    assert "alice" not in json.dumps(hidden.body)


# conversations


def test_the_models_own_template(tokenizer: Any) -> None:
    messages = [Message(role="developer", content="Be short."), Message(role="user", content="Hi")]
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert list(render(tokenizer, messages, ())) == expected


def test_the_plain_template_for_models_without_one() -> None:
    bare = AutoTokenizer.from_pretrained(resolve("demo").path)
    bare.chat_template = None
    messages = [
        Message(role="system", content="Be short."),
        Message(role="user", content=[{"type": "text", "text": "Hi"}]),
        Message(role="assistant", content="Hello."),
        Message(role="user", content="Who?"),
    ]
    text = "Be short.\n\nUser: Hi\nAssistant: Hello.\nUser: Who?\nAssistant:"
    assert list(render(bare, messages, ())) == bare(text)["input_ids"]
    assert "tools" not in PLAIN_TEMPLATE


def test_a_template_that_takes_no_notice_of_tools_gets_them_described(tokenizer: Any) -> None:
    prompt = tokenizer.decode(render(tokenizer, [Message(role="user", content="Hi")], (Tool(**WEATHER),)))
    assert '"name": "weather"' in prompt


def test_a_template_that_refuses_is_the_callers_error() -> None:
    strict = AutoTokenizer.from_pretrained(resolve("demo").path)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate"):
        render(strict, [Message(role="user", content="Hi")], ())


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "weather", "arguments": {"city": "Rome"}}', ("weather", '{"city": "Rome"}')),
        ('{"name": "weather", "parameters": {}}', ("weather", "{}")),
        ('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>', ("weather", "{}")),
        ('{"name": "other", "arguments": {}}', None),
        ('{"name": "weather", "arguments": "Rome"}', None),
        ('{"name": ["weather"]}', None),
        ("[1]", None),
        ("It is sunny.", None),
    ],
)
def test_tool_calls_are_understood(text: str, call: tuple[str, str] | None) -> None:
    try:
        assert parse_call(text, (Tool(**WEATHER),)) == call
    finally:
        if call is not None:
            assert all(may_be_call(text[:n]) for n in range(len(text)))


def test_tool_choice() -> None:
    tools = [Tool(**WEATHER)]
    assert plan_tools(None, None).tools == ()
    assert plan_tools(tools, "none").tools == ()
    assert plan_tools(tools, "auto").schema is None
    schema = plan_tools(tools, "required").schema
    assert schema is not None
    assert schema["properties"]["arguments"] == WEATHER["function"]["parameters"]  # type: ignore[index]
    with pytest.raises(ApiError, match="no tool"):
        plan_tools(tools, NamedTool(type="function", function={"name": "other"}))
    with pytest.raises(ApiError, match="needs tools"):
        plan_tools([], "required")


# grammars


def test_a_grammar_lets_json_of_the_schema_through_and_nothing_else(tokenizer: Any) -> None:
    factory = GrammarFactory(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = factory.json_schema(schema, "response_format")
    for token in tokenizer('{"n":22}', add_special_tokens=False)["input_ids"]:
        assert not grammar.finished
        assert grammar.allowed()[token]
        grammar.accept(token)
    assert grammar.finished or grammar.allowed().nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    wrong = tokenizer("[", add_special_tokens=False)["input_ids"][0]
    assert not factory.json_schema(schema, "response_format").allowed()[wrong]
    with pytest.raises(ApiError, match="can't be used"):
        factory.json_schema({"type": "nonsense"}, "response_format")
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert b"".join(factory.token_bytes(token) for token in euro) == "€".encode()
