"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from swarm.client.gateway.call import Call
from swarm.client.gateway.choices import Delta, TokenText, collect, merge, run_choice
from swarm.client.gateway.errors import invalid
from swarm.client.gateway.jobs import make_jobs
from swarm.client.gateway.reply import DONE, Answer, event
from swarm.client.gateway.schemas import CompletionRequest
from swarm.client.gateway.served_model import ServedModel

_DEFAULT_TOKENS = 16  # OpenAI's


async def complete(model: ServedModel, request: CompletionRequest, call: Call) -> Answer:
    """Continues each prompt ``n`` times; choices are numbered prompt by prompt."""
    if request.suffix:
        raise invalid("suffix is not supported: the models continue text, they don't fill it in", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid("best_of is not supported: ask for n choices, and choose", "best_of")
    if request.echo and request.logprobs is not None:
        raise invalid("echo is not supported together with logprobs", "echo")
    prompts = await model.prompts(request.prompt, "prompt")
    call.prompt_tokens = sum(map(len, prompts))
    jobs = make_jobs(model, request, prompts, request.max_tokens or _DEFAULT_TOKENS, "max_tokens", request.logprobs)
    echoes = [model.tokenizer.decode(job.prompt, skip_special_tokens=True) if request.echo else "" for job in jobs]
    choices = [run_choice(model, job, request.stops, call) for job in jobs]
    if request.stream:
        return _stream(model, request, call, choices, echoes)
    wholes = await collect(choices)
    return {
        **_head(model, call),
        "choices": [
            {
                "index": index,
                "text": echoes[index] + whole.text,
                "logprobs": _logprobs(model, request, whole.tokens, 0),
                "finish_reason": whole.finish,
            }
            for index, whole in enumerate(wholes)
        ],
        "usage": call.usage(),
    }


async def _stream(
    model: ServedModel,
    request: CompletionRequest,
    call: Call,
    choices: Sequence[AsyncGenerator[Delta, None]],
    echoes: list[str],
) -> AsyncGenerator[bytes, None]:
    head = _head(model, call)
    usage = {"usage": None} if request.include_usage else {}
    offsets = [0] * len(choices)
    async with aclosing(merge(choices)) as deltas:
        async for index, delta in deltas:
            text, echoes[index] = echoes[index] + delta.text, ""
            choice = {
                "index": index,
                "text": text,
                "logprobs": _logprobs(model, request, delta.tokens, offsets[index]),
                "finish_reason": delta.finish,
            }
            offsets[index] += len(text)
            yield event({**head, "choices": [choice], **usage})
    if request.include_usage:
        yield event({**head, "choices": [], "usage": call.usage()})
    yield DONE


def _head(model: ServedModel, call: Call) -> dict[str, Any]:
    return {"id": f"cmpl-{call.id}", "object": "text_completion", "created": call.created, "model": model.id}


def _logprobs(
    model: ServedModel, request: CompletionRequest, tokens: Sequence[TokenText], offset: int
) -> dict[str, Any] | None:
    if request.logprobs is None:
        return None
    texts = [model.token_text(each.token) for each in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [each.logprobs.logprob for each in tokens],
        "top_logprobs": [{model.token_text(token): value for token, value in each.logprobs.top} for each in tokens],
        "text_offset": [offset + sum(map(len, texts[:at])) for at in range(len(texts))],
    }
