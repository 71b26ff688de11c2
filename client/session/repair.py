"""Putting other hops in the place of one that failed, with what it was sent played into them."""

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
    """A hop has to be replaced that began with columns that it had already: nobody knows what it was sent for them."""


async def replay(
    failed: H,
    rows: int,
    pipeline: Pipeline[H],
    failures: Failures,
    open_hops: Callable[[torch.Tensor], Awaitable[list[H]]],
    width: Callable[[Sequence[H]], int],
) -> list[H]:
    """Hops for the blocks of ``failed``, as far as it had come. Tries others while those fail too.

    Args:
        rows: of the session, as they are now.
        open_hops: opens hops for these blocks; takes the row (``[rows]`` int64) that each row was at the beginning.
        width: columns of a step through hops at most.

    Raises:
        InputsMissing: what the hop was sent isn't known.
        SwarmError: what ``open_hops`` raises, or what can't be helped by asking others.
    """
    if failed.history.missing:
        raise InputsMissing
    while True:
        hidden, order = failed.history.replay(rows)
        hops = await open_hops(order)
        hop = hops[0]
        try:
            if hidden is not None:
                for hop in hops:
                    hidden = await _refill(hop, hidden, pipeline, width([hop]))
            return hops
        except BaseException as error:
            for opened in hops:  # also when the caller gives up: nobody else knows them
                opened.abandon()
            if not isinstance(error, SwarmError):
                raise
            await failures.met(hop, error)
            await failures.pause(error)


async def _refill(hop: H, hidden: torch.Tensor, pipeline: Pipeline[H], width: int) -> torch.Tensor:
    """Plays ``hidden`` into a new hop; its outputs."""
    outputs = []
    for at in range(0, hidden.shape[1], width):
        step_id, part = uuid.uuid4().hex, hidden[:, at : at + width]
        await pipeline.pass_to(hop, step_id, at, part)
        outputs.append(await pipeline.answer(hop, step_id, part))
        hop.forget(step_id)
    hop.history.append(0, hidden, None)
    return torch.cat(outputs, dim=1)
