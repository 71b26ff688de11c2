"""Putting other hops in the place of one that failed, with what it was sent played into them, or as much of it as they
have not taken over from it."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import torch

from swarm.errors import SwarmError

from .failures import Failures
from .pipeline import Pipeline
from .protocols import HopLike

H = TypeVar("H", bound=HopLike)


class InputsMissing(Exception):
    """A hop has to be replaced that began with columns that it had already, and hands them over to nobody: nobody knows
    what it was sent for them."""


async def replay(
    failed: H,
    rows: int,
    pipeline: Pipeline[H],
    failures: Failures,
    open_hops: Callable[[torch.Tensor], Awaitable[list[H]]],
    width: Callable[[Sequence[H]], int],
    *,
    handed_over: bool = False,
) -> list[H]:
    """Hops for the blocks of ``failed``, as far as it had come. Tries others while those fail too.

    Args:
        rows: of the session, as they are now.
        open_hops: opens hops for these blocks; takes the row (``[rows]`` int64) that each row was at the beginning.
        width: columns of a step through hops at most.
        handed_over: whether hops that are opened may take over what ``failed`` has in its cache.

    Raises:
        InputsMissing: what the hop was sent isn't known.
        SwarmError: what ``open_hops`` raises, or what can't be helped by asking others.
    """
    history = failed.history
    if history.missing and not handed_over:
        raise InputsMissing
    while True:
        hidden, order = history.replay(rows)
        hops = await open_hops(order)
        hop = hops[0]
        try:
            start = min(history.position, *(hop.reused for hop in hops)) if handed_over else 0
            if start < history.missing:
                raise InputsMissing
            begin = history.missing  # the column from which on the hop's inputs are known
            for hop in hops:
                hidden = await _refill(hop, begin, start, hidden, pipeline, width([hop]))
                begin = start
            return hops
        except BaseException as error:
            for opened in hops:  # also when the caller gives up: nobody else knows them
                opened.abandon()
            if not isinstance(error, SwarmError):
                raise
            await failures.met(hop, error)
            await failures.pause(error)


async def _refill(
    hop: H, begin: int, start: int, hidden: torch.Tensor | None, pipeline: Pipeline[H], width: int
) -> torch.Tensor | None:
    """Plays ``hidden``, the inputs from column ``begin`` on, into a new hop that has the columns before ``start``; its
    outputs for the others, if there are any."""
    outputs = []
    hop.history.skip(begin)
    if hidden is None:
        return None
    for at in range(start - begin, hidden.shape[1], width):
        step_id, part = uuid.uuid4().hex, hidden[:, at : at + width]
        await pipeline.pass_to(hop, step_id, begin + at, part)
        outputs.append(await pipeline.answer(hop, step_id, part))
        hop.forget(step_id)
    hop.history.append(begin, hidden, None)
    return torch.cat(outputs, dim=1) if outputs else None
