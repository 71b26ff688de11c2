"""From a request's options to jobs for the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarm.chance import CHANCE

from ..decode.generation import Grammar, Job
from ..errors import invalid
from ..requests.schemas import Sampling
from ..served_model import ServedModel


def make_jobs(
    model: ServedModel,
    request: Sampling,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int | None,
    param: str,
    top_logprobs: int | None,
    grammar: Callable[[], Grammar] | None = None,
    *,
    score_prompt: bool = False,
    trace: bool = False,
) -> list[Job]:
    """``n`` jobs for each prompt; choice ``i`` has the seed ``seed + i``.

    Args:
        max_tokens: None for as many as there is room for.
        param: which field to name when that is too many.
        grammar: makes one for each job.

    Raises:
        ApiError: the queue has no room for so many, a prompt is too long, or an option names a token that isn't there.
    """
    model.engine.check_room(len(prompts) * (request.n or 1))
    if any(token >= model.vocabulary for token in request.logit_bias or ()):
        raise invalid(f"token ids of this model are below {model.vocabulary}", "logit_bias")
    params = request.params(model.defaults)
    seed = CHANCE.getrandbits(62) if request.seed is None else request.seed
    jobs: list[Job] = []
    for prompt in prompts:
        room = model.room(prompt, max_tokens, param)
        for _ in range(request.n or 1):
            jobs.append(
                Job(
                    prompt=prompt,
                    max_tokens=room,
                    params=params,
                    seed=(seed + len(jobs)) % 2**63,
                    eos=frozenset() if request.ignore_eos else model.eos,
                    top_logprobs=top_logprobs,
                    score_prompt=score_prompt,
                    grammar=None if grammar is None else grammar(),
                    adapter=model.adapter,
                    trace=trace,
                )
            )
    return jobs
