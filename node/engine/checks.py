"""What is wrong with work, before anything is done for it. All raise :class:`~swarm.errors.BadRequestError`."""

from __future__ import annotations

from collections.abc import Container

import torch

from swarm.errors import BadRequestError, OutOfOrderError, UsageError
from swarm.model.layout import check_range
from swarm.model.span import Span

from .scheduling.row_group import RowGroup
from .scheduling.work import StepWork


def check_blocks(span: Span, first: int, last: int) -> None:
    """The blocks ``first:last`` are some of ``span``, and don't part those that belong together."""
    if not span.start <= first < last <= span.end:
        raise BadRequestError(f"blocks {first}:{last} are not served here; this node serves {span.start}:{span.end}")
    try:
        check_range(first, last, span.inner_boundaries)
    except UsageError as error:
        raise BadRequestError(str(error)) from None


def check_adapter(served: Container[str], adapter: str) -> None:
    """``adapter`` is empty, or among those that are ``served``."""
    if adapter and adapter not in served:
        raise BadRequestError(f"adapter {adapter!r} is not served here")


def check_hidden(span: Span, hidden: torch.Tensor) -> None:
    """``hidden`` is ``[rows, columns, H]``, of a floating dtype."""
    if hidden.dim() != 3 or not hidden.shape[0] or hidden.shape[2] != span.hidden_size:
        wanted = f"[rows, columns, {span.hidden_size}]"
        raise BadRequestError(f"hidden states have shape {list(hidden.shape)}, not {wanted}")
    if not hidden.is_floating_point():
        raise BadRequestError(f"hidden states are {hidden.dtype}, not of a floating dtype")


def check_prompts(span: Span, prompts: torch.Tensor | None, blocks: int, rows: int) -> None:
    """``prompts``, if any, are ``[blocks, rows or 1, length, H]``."""
    if prompts is None:
        return
    size = span.hidden_size
    if prompts.dim() != 4 or prompts.shape[1] not in (1, rows) or prompts.shape[::3] != (blocks, size):
        wanted = f"[{blocks}, {rows} or 1, length, {size}]"
        raise BadRequestError(f"prompts have shape {list(prompts.shape)}, not {wanted}")


def check_step(span: Span, session: RowGroup, work: StepWork) -> None:
    """``work`` fits ``session``: its rows, prompts and position."""
    rows = len(session.rows)
    if work.hypo_ids is not None:
        if not work.hypo_ids or not all(0 <= source < rows for source in work.hypo_ids):
            raise BadRequestError(f"hypo_ids {work.hypo_ids} don't name rows of a session of {rows}")
        rows = len(work.hypo_ids)
    if work.rows != rows:
        raise BadRequestError(f"the step has {work.rows} rows, the session {rows}")
    check_prompts(span, work.prompts, session.last - session.first, rows)
    if not 0 <= work.start <= session.position:
        raise OutOfOrderError(f"the step starts at position {work.start}, but the session is at {session.position}")
