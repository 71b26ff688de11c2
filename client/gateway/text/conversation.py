"""Conversations for chat templates that know no tools, or take system messages only in some places. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import from_json

from ..requests.schemas import Message

Turn = dict[str, Any]
"""A message as templates get it: ``role``, ``content`` (text, maybe empty), and whatever else it came with."""


def turn_of(message: Message) -> Turn:
    """A message of the API. The forms that it had before tools (``function_call``, role ``function``) become tools'."""
    turn = {name: value for name, value in message.model_dump().items() if value is not None}
    turn["content"] = message.content or ""
    turn["role"] = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if "function_call" in turn:
        turn.setdefault("tool_calls", [{"type": "function", "function": turn.pop("function_call")}])
    if isinstance(turn.get("tool_calls"), list):  # templates want arguments as an object, the API has them as text
        turn["tool_calls"] = [_parsed(call) for call in turn["tool_calls"]]
    return turn


def has_calls(conversation: Sequence[Turn]) -> bool:
    """Whether tools were called in it."""
    return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in conversation)


def write_out(conversation: Sequence[Turn]) -> list[Turn]:
    """Calls as the assistant's text, in the form that :func:`describe` asks for, and results as the user's.

    Turns of one role that follow one another by this become one, since many templates want the roles to alternate.
    """
    names: dict[str, Any] = {}
    turns: list[Turn] = []
    joins = False  # whether the turn before was made here
    for turn in conversation:
        calls = turn.get("tool_calls")
        made = turn["role"] == "tool" or (bool(calls) and isinstance(calls, list))
        if turn["role"] == "tool":
            name = names.get(str(turn.get("tool_call_id"))) or turn.get("name") or "the function"
            turn = {"role": "user", "content": f"Result of {name}: {turn['content']}"}
        elif made:
            assert isinstance(calls, list)
            names.update((str(call.get("id")), _function(call).get("name")) for call in calls if isinstance(call, dict))
            turn = {"role": turn["role"], "content": "\n".join([*filter(None, [turn["content"]]), *map(_text, calls)])}
        if turns and (made or joins) and turns[-1]["role"] == turn["role"]:
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{turn['content']}"}
        else:
            turns.append(turn)
        joins = made
    return turns


def describe(tools: Sequence[dict[str, Any]]) -> str:
    """What a model is told of tools that its template takes no notice of."""
    text = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return (
        f"You can call these functions:\n{text}\nTo call one, answer with nothing but "
        '{"name": its name, "arguments": {its parameters}}.'
    )


def lead_with(conversation: Sequence[Turn], text: str) -> list[Turn]:
    """``text`` behind the system message in front, or as one."""
    if conversation and conversation[0]["role"] == "system":
        first = conversation[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *conversation[1:]]
    return [{"role": "system", "content": text}, *conversation]


def ways_to_say(conversation: Sequence[Turn]) -> Iterator[list[Turn]]:
    """The conversation as it is; with one system message in front instead of several; with none, for templates that
    know of none: the first user's message begins with it."""
    yield list(conversation)
    count = next((at for at, turn in enumerate(conversation) if turn["role"] != "system"), len(conversation))
    lead = "\n\n".join(turn["content"] for turn in conversation[:count])
    rest = list(conversation[count:])
    if count > 1:
        yield [{"role": "system", "content": lead}, *rest]
    if count and rest and rest[0]["role"] == "user":
        yield [{**rest[0], "content": f"{lead}\n\n{rest[0]['content']}"}, *rest[1:]]


def _parsed(call: Any) -> Any:
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": from_json(function["arguments"])}}
    except (TypeError, KeyError, ValueError):  # among them half a surrogate pair, which is no text
        return call


def _function(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _text(call: Any) -> str:
    function = _function(call)
    kept = {name: function[name] for name in ("name", "arguments") if name in function}
    return json.dumps(kept or call, ensure_ascii=False)
