"""From logits to tokens, for many rows that each have their own options. Pure functions.

The order is that of transformers' ``generate``: penalties and biases on the logits, then temperature, top-k, top-p,
min-p. Penalties for presence and frequency are as OpenAI's API reference defines them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LIKELY = 256
"""Top-p looks at so many of the likeliest tokens first, and sorts the whole vocabulary only where they don't do."""


@dataclass(frozen=True)
class SamplingParams:
    """A row's options.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 for all.
        top_p, min_p: 1 and 0 for all.
        presence_penalty, frequency_penalty: taken off the logits of tokens in the text so far, once or per occurrence.
        repetition_penalty: divides (or multiplies, if negative) the logits of tokens in prompt and text; 1 for none.
        logit_bias: token to what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        seen: tokens of prompt and text, each once.
        counts: how often each token is in the text, without the prompt.
        allowed: ``[vocabulary]`` bool, what a grammar lets come next; None for everything.
        draw: uniform in [0, 1): which token of the distribution is taken.
    """

    params: SamplingParams
    seen: frozenset[int] | set[int] = frozenset()
    counts: Mapping[int, int] = field(default_factory=dict)
    allowed: Tensor | None = None
    draw: float = 0.0


def sample(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The next token of each row: ``[rows]`` int64.

    Args:
        logits: ``[rows, vocabulary]`` float32; not changed.
    """
    scores = adjust(logits, rows)
    tokens = scores.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        chosen = [rows[index] for index in drawn]
        probabilities = distribution(scores if len(drawn) == len(rows) else scores[drawn], [r.params for r in chosen])
        draws = torch.tensor([row.draw for row in chosen], dtype=torch.float64)
        tokens[drawn] = invert(probabilities, draws)
    return tokens


def adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after penalties, biases and grammars: ``[rows, vocabulary]``, the same tensor if nothing is to be done."""
    vocabulary = logits.shape[-1]
    repeated = [
        (index, token, row.params.repetition_penalty)
        for index, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0
        for token in row.seen
    ]
    added = [
        (index, token, amount)
        for index, row in enumerate(rows)
        for token, amount in _amounts(row)
        if 0 <= token < vocabulary
    ]
    masked = [index for index, row in enumerate(rows) if row.allowed is not None]
    if not (repeated or added or masked):
        return logits
    scores = logits.clone()
    if repeated:
        where, penalty = _flat(repeated, vocabulary, scores)
        values = scores.view(-1)[where]
        scores.view(-1)[where] = torch.where(values < 0, values * penalty, values / penalty)
    if added:
        where, amounts = _flat(added, vocabulary, scores)
        scores.view(-1).index_add_(0, where, amounts)
    for index in masked:
        scores[index].masked_fill_(~rows[index].allowed, -torch.inf)  # type: ignore[operator]
    return scores


def distribution(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities to sample from, ``[rows, vocabulary]``, zero for tokens that top-k, top-p or min-p leave out.

    Args:
        scores: ``[rows, vocabulary]``.
        params: of rows whose temperature is above 0.
    """
    scores = scores / _column([each.temperature for each in params], scores)
    vocabulary = scores.shape[-1]
    top_k = [each.top_k if 0 < each.top_k < vocabulary else 0 for each in params]
    if any(top_k):
        rows = [index for index, k in enumerate(top_k) if k]
        best = scores[rows].topk(max(top_k), dim=-1).values
        least = best.gather(1, torch.tensor([[top_k[index] - 1] for index in rows]))
        scores[rows] = scores[rows].masked_fill(scores[rows] < least, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    rows = [index for index, each in enumerate(params) if each.top_p < 1]
    if rows:
        kept = _nucleus(probabilities[rows], _column([params[index].top_p for index in rows], scores))
        probabilities[rows] = kept / kept.sum(dim=-1, keepdim=True)
    if any(each.min_p > 0 for each in params):
        least = probabilities.amax(dim=-1, keepdim=True) * _column([each.min_p for each in params], scores)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulated probability of a row passes its draw: ``[rows]`` int64.

    One number a row decides, so a row's token doesn't depend on what else is in the batch.

    Args:
        probabilities: ``[rows, vocabulary]``, need not sum to one.
        draws: ``[rows]`` float64 in [0, 1).
    """
    cumulated = probabilities.to(torch.float64).cumsum(dim=-1)
    target = draws[:, None] * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)  # if rounding goes beyond it
    return torch.minimum(tokens, last)


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities by the model itself, before any option: of ``tokens`` ``[rows]``, and of the likeliest.

    Returns:
        ``[rows]``, and the ``count`` likeliest as ids and values, ``[rows, count]`` each.
    """
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(count, dim=-1)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), best.indices, best.values


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero for tokens before which likelier ones make up ``top_p`` (``[rows, 1]``) already; the first one stays."""
    count = min(_LIKELY, probabilities.shape[-1])
    best = probabilities.topk(count, dim=-1)
    if count < probabilities.shape[-1] and bool((best.values.sum(dim=-1, keepdim=True) < top_p).any()):
        best = probabilities.sort(dim=-1, descending=True)  # type: ignore[assignment]
    before = best.values.cumsum(dim=-1) - best.values
    values = best.values.masked_fill(before >= top_p, 0.0)
    values[:, 0] = best.values[:, 0]
    return torch.zeros_like(probabilities).scatter_(1, best.indices, values)


def _amounts(row: Row) -> list[tuple[int, float]]:
    params = row.params
    amounts = list(params.logit_bias.items())
    if params.presence_penalty or params.frequency_penalty:
        amounts += [
            (token, -params.presence_penalty - params.frequency_penalty * count) for token, count in row.counts.items()
        ]
    return amounts


def _flat(entries: Sequence[tuple[int, int, float]], vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the flattened logits, and a value for each."""
    where = torch.tensor([index * vocabulary + token for index, token, _ in entries])
    return where, torch.tensor([value for _, _, value in entries], dtype=like.dtype)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype)[:, None]
