"""The output head for many sessions of one process: whoever waits while it computes is computed together next.

Reading the head's weights is what a token costs a client, often more than the rest of its work, and costs the same for
sixteen rows as for one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from swarm.compute.packed_linear import PackedLinear, can_pack
from swarm.compute.tiles import tile_linear

MAX_ROWS = 64
"""Inputs of more rows, such as the logits of a whole prompt, are worth a computation of their own."""
_GATHER_SECONDS = 0.001
_PACKED_BYTES = 1 << 30  # a copy of a larger head is too much memory to take from a client unasked


class _Ticket:
    """One thread's rows, until they are done or the thread is asked to compute for all that wait."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.output: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.called = threading.Event()


class CombinedForward:
    """Takes the place of a linear layer's ``forward``, for inference on a CPU."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forward = forward
        self._lock = threading.Lock()
        self._waiting: list[_Ticket] = []
        self._turn: _Ticket | None = None  # whose thread computes, or is about to
        self._together = False  # whether the last computation was for several

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[…, in]`` to ``[…, out]``."""
        rows = x.shape[:-1].numel()
        if not 0 < rows <= MAX_ROWS or (torch.is_grad_enabled() and x.requires_grad) or x.device.type != "cpu":
            return self._forward(x)
        ticket = _Ticket(x.reshape(rows, x.shape[-1]))
        try:  # whatever a thread is interrupted in, as by Ctrl-C: the others don't wait for it
            with self._lock:
                self._waiting.append(ticket)
                first = self._turn is None
                if first:
                    self._turn = ticket
            if not first:
                ticket.called.wait()
            if ticket.output is None and ticket.error is None:
                self._compute(ticket)
        finally:
            self._leave(ticket)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.output is not None
        return ticket.output.view(*x.shape[:-1], -1)

    def _compute(self, mine: _Ticket) -> None:
        """Computes for all that wait, the caller among them."""
        if self._together:
            time.sleep(_GATHER_SECONDS)  # sessions that were computed together come back together, one after the other
        with self._lock:
            batch, self._waiting = self._waiting, []
        self._together = len(batch) > 1
        try:
            together = batch[0].rows if len(batch) == 1 else torch.cat([ticket.rows for ticket in batch])
            outputs = self._forward(together).split([len(ticket.rows) for ticket in batch])
            for ticket, output in zip(batch, outputs, strict=True):
                ticket.output = output
        except Exception as error:
            for ticket in batch:
                ticket.error = error
        except BaseException:  # meant for this thread alone
            with self._lock:
                self._waiting = [ticket for ticket in batch if ticket is not mine] + self._waiting
            raise
        for ticket in batch:
            ticket.called.set()

    def _leave(self, ticket: _Ticket) -> None:
        """Gives the turn to compute, if it is this ticket's, to one of those that came meanwhile."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if self._turn is not ticket:
                return
            self._turn = successor = self._waiting[0] if self._waiting else None
        if successor is not None:
            successor.called.set()


class PackedForward:
    """Takes the place of a linear layer's ``forward``: computes with a packed copy of its weights, made when first
    needed. The weights themselves stay, mostly mapped from a file and then not in memory; who trains them uses them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._forward = linear.forward
        self._packed: PackedLinear | None = None
        self._version = -1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[…, in]`` to ``[…, out]``."""
        weight = self._linear.weight
        if (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)) or not can_pack(weight):
            return self._forward(x)
        version = 0 if weight.is_inference() else weight._version
        if self._packed is None or self._version != version:
            self._packed, self._version = PackedLinear(self._linear, keep=True), version
        packed: torch.Tensor = self._packed(x)
        return packed


def combine_head(model: nn.Module, *, deterministic: bool = False) -> None:
    """Makes the output head of ``model`` compute together what several threads ask of it at a time; if it is to be
    ``deterministic``, then so that none can tell."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        if deterministic:
            tile_linear(head)
        elif head.weight.nbytes <= _PACKED_BYTES:
            head.forward = PackedForward(head)  # type: ignore[method-assign, assignment]
        head.forward = CombinedForward(head.forward)  # type: ignore[method-assign, assignment]
