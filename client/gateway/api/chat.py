"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from ..decode.generation import Grammar
from ..errors import invalid
from ..requests.schemas import ChatRequest
from ..served_model import ServedModel
from ..text.grammar import ANY_OBJECT
from ..text.templates import render
from ..text.tool_calls import ToolPlan, may_be_call, parse_call, plan_tools
from .call import Call
from .choices import Delta, TokenText, Whole, collect, merge, run_choice
from .jobs import make_jobs
from .reply import DONE, Answer, event
from .trace import trace_json


async def chat(model: ServedModel, request: ChatRequest, call: Call) -> Answer:
    """Answers a conversation ``n`` times."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    model.check_size(call.size, "messages")
    plan = plan_tools(request.tools, request.tool_choice)
    grammar = await model.in_thread(partial(_grammar, model, request, plan))
    rendered = await model.in_thread(partial(render, model.tokenizer, request.messages, plan.tools))
    prompt = model.known(rendered, "messages")
    call.prompt_tokens = len(prompt)
    told = (request.top_logprobs or 0) if request.logprobs else None
    limit, param = request.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, param = request.max_tokens, "messages" if request.max_tokens is None else "max_tokens"
    trace = request.swarm_trace and bool(request.stream)
    jobs = make_jobs(model, request, [prompt], limit, param, told, grammar, trace=trace)
    choices = [run_choice(model, job, request.stops, call) for job in jobs]
    if request.stream:
        return _stream(model, request, call, plan, choices)
    wholes = await collect(choices)
    return {
        **_head(model, call, "chat.completion"),
        "choices": [_choice(model, request, plan, call, index, whole) for index, whole in enumerate(wholes)],
        "usage": call.usage(),
    }


def _grammar(model: ServedModel, request: ChatRequest, plan: ToolPlan) -> Callable[[], Grammar] | None:
    """Makes what the answer is held to, if there is something. Tried once here, so that errors come early."""
    wanted = request.response_format
    if plan.schema is not None:
        schema, param = plan.schema, "tools"
    elif wanted is None or wanted.type == "text":
        return None
    elif wanted.type == "json_object":
        schema, param = ANY_OBJECT, "response_format"
    elif wanted.json_schema is None:
        raise invalid("response_format of type json_schema needs json_schema", "response_format")
    else:
        schema, param = wanted.json_schema.schema_, "response_format"
    factory = model.grammars
    factory.json_schema(schema, param)
    return lambda: factory.json_schema(schema, param)


def _choice(
    model: ServedModel, request: ChatRequest, plan: ToolPlan, call: Call, index: int, whole: Whole
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
    finish = whole.finish
    called = parse_call(whole.text, plan.tools) if plan.watch else None
    if called is not None:
        message |= {"content": None, "tool_calls": [_tool_call(call, index, *called)]}
        finish = "tool_calls"
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(model, request, whole.tokens),
        "finish_reason": finish,
    }


async def _stream(
    model: ServedModel, request: ChatRequest, call: Call, plan: ToolPlan, choices: Sequence[AsyncGenerator[Delta, None]]
) -> AsyncGenerator[bytes, None]:
    head = _head(model, call, "chat.completion.chunk")
    usage = {"usage": None} if request.include_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **usage})

    # what may be a tool call is held back until it is clear whether it is one
    held = [Whole() if plan.watch else None for _ in choices]
    begun = [False] * len(choices)
    async with aclosing(merge(choices)) as deltas:
        async for index, delta in deltas:
            if not begun[index]:
                begun[index] = True
                yield chunk(index, {"role": "assistant", "content": ""})
            if delta.trace:
                choice = {"index": index, "delta": {}, "finish_reason": None}
                yield event({**head, "choices": [choice], "swarm": trace_json(model, delta.trace), **usage})
                if not delta.text and delta.finish is None and not delta.tokens:
                    continue
            finish, back = delta.finish, held[index]
            if back is not None:
                back.add(delta)
                if finish is None and may_be_call(back.text):
                    continue
                called = parse_call(back.text, plan.tools) if finish is not None else None
                if called is not None:
                    tool = {"index": 0, **_tool_call(call, index, *called)}
                    yield chunk(index, {"tool_calls": [tool]}, None, _logprobs(model, request, back.tokens))
                    yield chunk(index, {}, "tool_calls")
                    continue
                delta, held[index] = Delta(back.text, tuple(back.tokens), finish), None
            if delta.text or delta.tokens:
                yield chunk(index, {"content": delta.text}, None, _logprobs(model, request, delta.tokens))
            if finish is not None:
                yield chunk(index, {}, finish)
    if request.include_usage:
        yield event({**head, "choices": [], "usage": call.usage()})
    yield DONE


def _head(model: ServedModel, call: Call, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.id}", "object": kind, "created": call.created, "model": model.id}


def _tool_call(call: Call, index: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{call.id[:20]}{index}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _logprobs(model: ServedModel, request: ChatRequest, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
    if not request.logprobs:
        return None

    def entry(token: int, value: float | None) -> dict[str, Any]:
        raw = model.token_bytes(token)
        return {"token": model.token_text(token), "logprob": value, "bytes": list(raw)}

    return {
        "content": [
            {
                **entry(each.token, each.logprobs.logprob),
                "top_logprobs": [entry(*likely) for likely in each.logprobs.top],
            }
            for each in tokens
        ],
        "refusal": None,
    }
