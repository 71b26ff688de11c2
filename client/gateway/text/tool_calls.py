"""Which tools a model may call, and its answers as calls of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import invalid
from ..requests.schemas import NamedTool, Tool

_NAMES_NONE = {"$schema", "type", "title", "description", "properties", "required"}
"""Keys of a schema that lets no parameter in besides those that it lists."""
_TAGGED = re.compile(r"^\s*<tool_call>\s*(\{.*\})\s*</tool_call>\s*$", re.DOTALL)


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
    parameters = tool.function.parameters or {}
    listed = parameters.get("properties") or parameters.get("required")
    if not listed and parameters.keys() <= _NAMES_NONE:  # by itself, JSON schema would let any argument in
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
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
