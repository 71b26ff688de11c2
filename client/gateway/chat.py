"""Conversations to prompts, and answers to tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm.client.gateway.errors import invalid
from swarm.client.gateway.schemas import Message, NamedTool, Tool

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template of their own."""

_TAGGED = re.compile(r"^\s*<tool_call>\s*(\{.*\})\s*</tool_call>\s*$", re.DOTALL)


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
    """The prompt of a conversation as token ids, by the model's own chat template.

    A template that takes no notice of tools gets them described in a system message.

    Raises:
        ApiError: the template refuses the conversation.
    """
    conversation = [_plain(message) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        text = _apply(tokenizer, conversation, described)
        if described and text == _apply(tokenizer, conversation, []):
            text = _apply(tokenizer, [_about(described), *conversation], [])
    except Exception as error:  # templates are programs of the model's makers, and raise all sorts
        raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from error
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not ids:
        raise invalid("the messages are empty", "messages")
    return tuple(ids)


def _apply(tokenizer: Any, conversation: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text: str = tokenizer.apply_chat_template(
        conversation, tools=tools or None, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return text


def _plain(message: Message) -> dict[str, Any]:
    fields = {name: value for name, value in message.model_dump().items() if value is not None}
    fields["content"] = message.content or ""
    if message.role == "developer":
        fields["role"] = "system"
    calls = fields.get("tool_calls")
    if isinstance(calls, list):  # templates want arguments as an object, the API has them as text
        fields["tool_calls"] = [_parsed(call) for call in calls]
    return fields


def _parsed(call: Any) -> Any:
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (TypeError, KeyError, ValueError):
        return call


def _about(tools: list[dict[str, Any]]) -> dict[str, Any]:
    text = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return {
        "role": "system",
        "content": f"You can call these functions:\n{text}\nTo call one, answer with nothing but "
        '{"name": its name, "arguments": {its parameters}}.',
    }


@dataclass(frozen=True)
class ToolPlan:
    """Which tools the model is told of, and what its answer is held to.

    Attributes:
        schema: of the answer, if a tool has to be called.
        watch: the answer may be a tool call.
    """

    tools: tuple[Tool, ...] = ()
    schema: dict[str, Any] | None = None
    watch: bool = False


def plan_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | None) -> ToolPlan:
    """What ``tools`` and ``tool_choice`` of a request ask for.

    Raises:
        ApiError: a tool is asked for that isn't there.
    """
    given = tuple(tools or ())
    if choice == "none" or not given:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice needs tools", "tool_choice")
        return ToolPlan()
    if choice in (None, "auto"):
        return ToolPlan(given, watch=True)
    forced = given
    if isinstance(choice, NamedTool):
        forced = tuple(tool for tool in given if tool.function.name == choice.function.name)
        if not forced:
            raise invalid(f"there is no tool {choice.function.name!r} in tools", "tool_choice")
    options = [_call_schema(tool) for tool in forced]
    return ToolPlan(given, options[0] if len(options) == 1 else {"anyOf": options}, watch=True)


def _call_schema(tool: Tool) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def may_be_call(text: str) -> bool:
    """Whether a text that begins like this may turn out to be a tool call."""
    start = text.lstrip()
    return not start or start.startswith("{") or start.startswith("<tool_call>"[: len(start)])


def parse_call(text: str, tools: Sequence[Tool]) -> tuple[str, str] | None:
    """Name and arguments (as JSON) if ``text`` is a call of one of ``tools``, else None.

    Understood are a JSON object with ``name`` and ``arguments`` or ``parameters``, as Llama 3 writes it, and one
    between ``<tool_call>`` tags, as Qwen and Hermes write it.
    """
    tagged = _TAGGED.match(text)
    try:
        call = json.loads(tagged[1] if tagged else text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in [tool.function.name for tool in tools]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    return (call["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None
