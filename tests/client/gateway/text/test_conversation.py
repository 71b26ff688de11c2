"""Conversations with tools and system messages, for templates that know them and those that don't."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from swarm.client.gateway.errors import ApiError
from swarm.client.gateway.requests.schemas import Message, Tool
from swarm.client.gateway.text.conversation import turn_of, write_out
from swarm.client.gateway.text.templates import render
from swarm.model.source import resolve

WEATHER = Tool(
    type="function",
    function={  # type: ignore[arg-type]
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
)
# folds a system message into the first user's, wants roles to alternate, and takes no notice of tools
STRICT = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}> {{ lead if loop.first else '' }} {{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }}> {{ m.content }}\n{% endfor %}"
)
LEAVES_SYSTEM_OUT = "{% for m in messages if m.role != 'system' %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
KNOWS = (
    "{% for t in tools or () %}{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls or () %}{{ c.function.name }}={{ c.function.arguments.city }}"
    "{{ c.function.arguments.text }}{% endfor %}\n{% endfor %}"
)


def rendered(template: str | None, messages: list[dict[str, Any]], tools: tuple[Tool, ...] = ()) -> str:
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo").path)
    tokenizer.chat_template = template
    ids = render(tokenizer, [Message(**message) for message in messages], tools)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str, id: str = "c1") -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


LOOP = [
    said("user", "Where is sun?"),
    said("assistant", None, tool_calls=[call("Rome"), call("Oslo", "c2")]),
    said("tool", "Sunny.", tool_call_id="c1"),
    said("tool", "Rain.", tool_call_id="c2"),
]
WRITTEN = [
    said("user", "Where is sun?"),
    said(
        "assistant", "\n".join(f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}' for city in ("Rome", "Oslo"))
    ),
    said("user", "Result of weather: Sunny.\nResult of weather: Rain."),
]


def test_calls_and_results_written_out() -> None:
    turns = [turn_of(Message(**message)) for message in LOOP]
    assert write_out(turns) == WRITTEN
    assert write_out([*turns, said("user", "And now?")])[-1]["content"].endswith("Rain.\nAnd now?")
    assert write_out(turns[:1]) == turns[:1]
    two = [said("user", "a"), said("user", "b")]
    assert write_out(two) == two, "only what was made here is joined"


@pytest.mark.parametrize(
    "calls",
    [[5], [{"function": 5}], ["x"], [{}], [{"id": [1], "function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]],
)
def test_calls_that_are_none_are_written_out_as_they_are(calls: list[Any]) -> None:
    (turn,) = write_out([turn_of(Message(role="assistant", tool_calls=calls))])  # type: ignore[call-arg]
    assert turn.keys() == {"role", "content"}
    turn["content"].encode()


@pytest.mark.parametrize("template", [None, STRICT, NO_SYSTEM, LEAVES_SYSTEM_OUT])
def test_a_template_that_knows_no_tools_still_says_everything(template: str | None) -> None:
    before = [said("system", "Be brief.")] if template != LEAVES_SYSTEM_OUT else []
    text = rendered(template, [*before, *LOOP], (WEATHER,))
    for part in ("You can call these functions", '"name": "weather"', *(["Be brief."] if before else [])):
        assert text.count(part) >= 1
    for turn in WRITTEN:
        assert turn["content"] in text
    assert "Sunny." in rendered(template, LOOP), "also without the tools"


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    text = rendered(KNOWS, LOOP, (WEATHER,))
    assert "assistant> weather=Romeweather=Oslotool> Sunny.tool> Rain." in text
    assert "You can call" not in text
    old = [
        said("user", "Hi"),
        said("assistant", None, function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
        said("function", "Sunny.", name="weather"),
    ]
    assert "weather=Rometool> Sunny." in rendered(KNOWS, old)


def test_several_system_messages_become_one_where_a_template_wants_that() -> None:
    text = rendered(STRICT, [said("system", "Be brief."), said("developer", "Be kind."), said("user", "Hi")])
    assert text == "user> Be brief.\n\nBe kind. Hi\n"
    assert rendered(NO_SYSTEM, [said("system", "Be brief."), said("user", "Hi")]) == "user> Be brief.\n\nHi\n"
    with pytest.raises(ApiError, match="roles must alternate"):
        rendered(STRICT, [said("user", "Hi"), said("user", "Hi")])
