"""Forward and backward passes without a cache, some rows at a time, so that they don't hold up sessions for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch

from swarm.errors import BadRequestError
from swarm.model.span import Span

from . import executor
from .checks import check_adapter, check_blocks, check_hidden, check_prompts
from .scheduling.work import DenseWork, fail
from .stats import Counters


class DenseTurns:
    """Turns of the engine over ``waiting``: some rows of one work, and what is left of it queues behind the others."""

    def __init__(self, span: Span, counters: Counters, *, max_tokens: int, adapters: Collection[str] = ()) -> None:
        self.waiting: deque[DenseWork] = deque()
        self._span = span
        self._counters = counters
        self._tokens = max_tokens
        self._adapters = adapters

    def choose(self) -> DenseWork | None:
        """What runs next, which doesn't wait then; None if there is nothing, or it is cancelled."""
        work = self.waiting.popleft() if self.waiting else None
        return work if work and (work.future.running() or work.future.set_running_or_notify_cancel()) else None

    def run(self, work: DenseWork) -> int:
        """Compute the next rows of ``work``, and return how many tokens. Raises what the blocks raise, and as
        :func:`advance`."""
        check_adapter(self._adapters, work.adapter)
        return advance(self._span, work, max_tokens=self._tokens)

    def deliver(self, work: DenseWork, tokens: int, seconds: float, waited_s: float) -> None:
        """Tell the result, if all rows are done."""
        self._counters.dense_tokens += tokens
        if work.done < work.hidden.shape[0]:
            self.waiting.append(work)
        elif work.grad is None:
            work.future.set_result(work.output)  # type: ignore[arg-type]
        else:
            work.future.set_result((work.output, work.prompt_grad))  # type: ignore[arg-type]

    def shrink(self, work: DenseWork) -> bool:
        """There was no memory for the next rows of ``work``: fewer at a time from now on. False: it was only one."""
        rows, columns, _ = work.hidden.shape
        together = min(rows - work.done, self._tokens // max(1, columns))
        if together < 2:
            return False
        self._tokens = together * columns // 2
        self.waiting.appendleft(work)
        return True

    def fail(self, work: DenseWork, error: Exception) -> None:
        """``work`` failed, and ends."""
        fail(work.future, error)


def advance(span: Span, work: DenseWork, *, max_tokens: int) -> int:
    """Do the next rows of ``work``, of ``max_tokens`` tokens if it is more than one, and return how many tokens.

    Raises:
        BadRequestError: the blocks aren't served here, or a shape is wrong.
    """
    check_blocks(span, work.first, work.last)
    check_hidden(span, work.hidden)
    rows, columns, _ = work.hidden.shape
    check_prompts(span, work.prompts, work.last - work.first, rows)
    if work.grad is not None and work.grad.shape != work.hidden.shape:
        raise BadRequestError(f"grad has shape {list(work.grad.shape)}, hidden {list(work.hidden.shape)}")
    end = min(rows, work.done + max(1, max_tokens // max(1, columns)))
    with torch.inference_mode(work.grad is None):
        if work.output is None:
            work.output = torch.zeros(rows, columns, span.hidden_size, dtype=span.dtype)
        if work.grad is not None:
            _backward(span, work, work.grad[work.done : end], work.output, kept_tokens=8 * max_tokens)
        elif end > work.done and columns:
            hidden, prompts = _rows_of(span, work, end)
            work.output[work.done : end] = executor.forward(
                span, hidden, first=work.first, last=work.last, prompts=prompts, adapter=work.adapter
            )
    tokens = (end - work.done) * columns
    work.done = end
    return tokens


def _backward(span: Span, work: DenseWork, grad: torch.Tensor, output: torch.Tensor, *, kept_tokens: int) -> None:
    end = work.done + len(grad)
    hidden, prompts = _rows_of(span, work, end)
    if work.prompts is not None and work.prompt_grad is None:
        work.prompt_grad = torch.zeros_like(work.prompts, dtype=hidden.dtype)
    if not hidden.numel():
        return
    output[work.done : end], prompt_grad = executor.backward(
        span,
        hidden,
        grad.to(hidden),
        first=work.first,
        last=work.last,
        prompts=prompts,
        adapter=work.adapter,
        kept_tokens=kept_tokens,
    )
    if prompt_grad is not None and work.prompt_grad is not None:
        place = work.prompt_grad if work.prompt_grad.shape[1] == 1 else work.prompt_grad[:, work.done : end]
        place += prompt_grad.cpu()


def _rows_of(span: Span, work: DenseWork, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden = work.hidden[work.done : end].to(span.device, span.dtype)
    if work.prompts is None:
        return hidden, None
    mine = work.prompts if work.prompts.shape[1] == 1 else work.prompts[:, work.done : end]
    return hidden, mine.to(span.device, span.dtype)
