"""Conversations to prompts, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import invalid
from ..requests.schemas import Message, Tool
from .conversation import Turn, describe, has_calls, lead_with, turn_of, ways_to_say, write_out

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template of their own."""

_HELLO: Turn = {"role": "user", "content": "Hi"}
_GIVEN, _RETURNED = "swarmprobegiven", "swarmprobereturned"
_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
_CALL = {"id": "probe1234", "type": "function", "function": {"name": "probe", "arguments": {"text": _GIVEN}}}
_CALLED: list[Turn] = [
    _HELLO,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "probe1234", "name": "probe", "content": _RETURNED},
]


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
    """The prompt of a conversation as token ids.

    A template that takes no notice of tools gets them described in the system message, and their calls and results as
    text. System messages are joined, or put into the user's first message, if the template refuses them otherwise.

    Raises:
        ApiError: the template refuses the conversation.
    """
    conversation = [turn_of(message) for message in messages]
    given = [tool.model_dump(exclude_none=True) for tool in tools]
    if has_calls(conversation) and not _shows_calls(tokenizer):
        conversation = write_out(conversation)
    if given and not _shows_tools(tokenizer, given):
        text = _first(tokenizer, lead_with(conversation, describe(given)), [], must_have=describe(given))
    else:
        text = _first(tokenizer, conversation, given)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not ids:
        raise invalid("the messages are empty", "messages")
    return tuple(ids)


def _first(tokenizer: Any, conversation: list[Turn], tools: list[dict[str, Any]], must_have: str = "") -> str:
    """The first of the ways to say it that the template takes, and that has ``must_have`` in it if there is one."""
    texts, refusals = [], []
    for way in ways_to_say(conversation):
        try:
            text = _apply(tokenizer, way, tools)
        except Exception as error:  # templates are programs of the model's makers, and raise all sorts
            refusals.append(error)
            continue
        if must_have in text:
            return text
        texts.append(text)
    if texts:
        return texts[0]
    raise invalid(f"the model's chat template refuses these messages: {refusals[0]}", "messages") from refusals[0]


def _shows_tools(tokenizer: Any, tools: list[dict[str, Any]]) -> bool:
    try:
        return _apply(tokenizer, [_HELLO], tools) != _apply(tokenizer, [_HELLO], [])
    except Exception:
        return False


def _shows_calls(tokenizer: Any) -> bool:
    """Whether a call and its result get into the prompt. It is tried out: of a template that knows neither, some leave
    them out and others raise."""
    try:
        text = _apply(tokenizer, _CALLED, [_TOOL])
    except Exception:
        return False
    return _GIVEN in text and _RETURNED in text


def _apply(tokenizer: Any, conversation: list[Turn], tools: list[dict[str, Any]]) -> str:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text: str = tokenizer.apply_chat_template(
        conversation, tools=tools or None, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return text
