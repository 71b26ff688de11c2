"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from ..errors import invalid
from ..requests.schemas import CompletionRequest
from ..served_model import ServedModel
from ..text.text import NO_ECHO, Echo, spell
from .call import Call
from .choices import Delta, TokenText, Whole, collect, merge, run_choice
from .jobs import make_jobs
from .reply import DONE, Answer, event

_DEFAULT_TOKENS = 16  # OpenAI's


async def complete(model: ServedModel, request: CompletionRequest, call: Call) -> Answer:
    """Continues each prompt ``n`` times; choices are numbered prompt by prompt."""
    if request.suffix:
        raise invalid("suffix is not supported: the models continue text, they don't fill it in", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid("best_of is not supported: ask for n choices, and choose", "best_of")
    limit = _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    if not limit and not request.echo:
        raise invalid("max_tokens: 0 gives something only with echo: true", "max_tokens")
    prompts = await model.prompts(request.prompt, "prompt")
    call.prompt_tokens = sum(map(len, prompts))
    scored = bool(request.echo) and request.logprobs is not None
    jobs = make_jobs(model, request, prompts, limit, "max_tokens", request.logprobs, score_prompt=scored)
    echoes: dict[tuple[int, ...], Echo] = {}
    for prompt in prompts if request.echo else ():
        echoes[prompt] = await model.in_thread(partial(spell, model.tokenizer, prompt))
    choices = [run_choice(model, job, request.stops, call, echoes.get(job.prompt, NO_ECHO)) for job in jobs]
    if request.stream:
        return _stream(model, request, call, choices)
    wholes = await collect(choices)
    return {
        **_head(model, call),
        "choices": [await _choice(model, request, index, whole) for index, whole in enumerate(wholes)],
        "usage": call.usage(),
    }


async def _stream(
    model: ServedModel, request: CompletionRequest, call: Call, choices: Sequence[AsyncGenerator[Delta, None]]
) -> AsyncGenerator[bytes, None]:
    head = _head(model, call)
    usage = {"usage": None} if request.include_usage else {}
    async with aclosing(merge(choices)) as deltas:
        async for index, delta in deltas:
            yield event({**head, "choices": [await _choice(model, request, index, delta)], **usage})
    if request.include_usage:
        yield event({**head, "choices": [], "usage": call.usage()})
    yield DONE


async def _choice(model: ServedModel, request: CompletionRequest, index: int, made: Delta | Whole) -> dict[str, Any]:
    logprobs = None
    if request.logprobs is not None:  # a long prompt has many tokens to spell
        logprobs = await model.in_thread(partial(_logprobs, model, made.tokens))
    return {"index": index, "text": made.text, "logprobs": logprobs, "finish_reason": made.finish}


def _head(model: ServedModel, call: Call) -> dict[str, Any]:
    return {"id": f"cmpl-{call.id}", "object": "text_completion", "created": call.created, "model": model.id}


def _logprobs(model: ServedModel, tokens: Sequence[TokenText]) -> dict[str, Any]:
    return {
        "tokens": [model.token_text(each.token) for each in tokens],
        "token_logprobs": [each.logprobs.logprob for each in tokens],
        "top_logprobs": [_top(model, each) for each in tokens],
        "text_offset": [each.offset for each in tokens],
    }


def _top(model: ServedModel, told: TokenText) -> dict[str, float] | None:
    """By text, the token itself among them. Of tokens that look alike, as parts of characters do, the likeliest."""
    if told.logprobs.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, value in (*told.logprobs.top, (told.token, told.logprobs.logprob)):
        top.setdefault(model.token_text(token), value)
    return top
