"""``POST /v1/responses`` for one question and its answer. Nothing is kept, so a response can't be gone on from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from pydantic import ValidationError

from ..errors import invalid
from ..requests.parse import refused
from ..requests.schemas import Message, ResponsesRequest, Sampling
from ..served_model import ServedModel
from ..text.templates import render
from .call import Call
from .choices import Delta, Whole, collect, run_choice
from .jobs import make_jobs
from .reply import Answer, event


async def respond(model: ServedModel, request: ResponsesRequest, call: Call) -> Answer:
    """Answers ``input``."""
    if request.previous_response_id is not None:
        raise invalid("responses are not kept: send the whole conversation as input", "previous_response_id")
    if request.tools:
        raise invalid("tools are only supported by /v1/chat/completions", "tools")
    wanted = (request.text or {}).get("format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type", "text") == "text"):
        raise invalid("structured output is only supported by /v1/chat/completions", "text.format")
    model.check_size(call.size, "input")
    prompt = model.known(await model.in_thread(partial(render, model.tokenizer, _messages(request), ())), "input")
    call.prompt_tokens = len(prompt)
    sampling = Sampling(model=request.model, temperature=request.temperature, top_p=request.top_p)
    (job,) = make_jobs(model, sampling, [prompt], request.max_output_tokens, "max_output_tokens", None)
    choice = run_choice(model, job, (), call)
    if request.stream:
        return _stream(model, request, call, choice)
    (whole,) = await collect([choice])
    return _response(model, request, call, whole)


def _messages(request: ResponsesRequest) -> list[Message]:
    messages = [] if request.instructions is None else [Message(role="system", content=request.instructions)]
    given = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    for number, item in enumerate(given):
        if item.get("type", "message") != "message":
            raise invalid(f"input items of type {item.get('type')!r} are not supported", "input")
        try:
            message = Message.model_validate({"role": item.get("role", "user"), "content": item.get("content")})
        except ValidationError as error:
            raise refused(error, "input", str(number)) from error
        messages.append(message)
    if not given:
        raise invalid("input is empty", "input")
    return messages


def _response(model: ServedModel, request: ResponsesRequest, call: Call, whole: Whole | None) -> dict[str, Any]:
    """The response; under way while ``whole`` is None."""
    finished = whole is not None
    cut = whole is not None and whole.finish == "length"
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": call.created,
        "status": ("incomplete" if cut else "completed") if finished else "in_progress",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": model.id,
        "output": [] if whole is None else [_item(call, whole)],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": request.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": request.top_p,
        "metadata": {},
        "usage": _usage(call) if finished else None,
    }


def _usage(call: Call) -> dict[str, Any]:
    return {
        "input_tokens": call.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": call.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.prompt_tokens + call.completion_tokens,
        **call.times(),
    }


def _item(call: Call, whole: Whole | None) -> dict[str, Any]:
    content = [] if whole is None else [_part(whole.text)]
    status = "in_progress" if whole is None else "incomplete" if whole.finish == "length" else "completed"
    return {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _stream(
    model: ServedModel, request: ResponsesRequest, call: Call, choice: AsyncGenerator[Delta, None]
) -> AsyncGenerator[bytes, None]:
    number = -1

    def say(name: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    place = {"item_id": f"msg_{call.id}", "output_index": 0, "content_index": 0}
    whole = Whole()
    async with aclosing(choice) as deltas:
        async for delta in deltas:
            if number < 0:
                yield say("response.created", response=_response(model, request, call, None))
                yield say("response.in_progress", response=_response(model, request, call, None))
                yield say("response.output_item.added", output_index=0, item=_item(call, None))
                yield say("response.content_part.added", **place, part=_part(""))
            whole.add(delta)
            if delta.text:
                yield say("response.output_text.delta", **place, delta=delta.text, logprobs=[])
    yield say("response.output_text.done", **place, text=whole.text, logprobs=[])
    yield say("response.content_part.done", **place, part=_part(whole.text))
    yield say("response.output_item.done", output_index=0, item=_item(call, whole))
    end = "response.incomplete" if whole.finish == "length" else "response.completed"
    yield say(end, response=_response(model, request, call, whole))
