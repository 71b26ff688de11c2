"""Checks of what arrives, before anything is allocated or computed. Pure functions that raise ``BadRequestError``, or
``NotServedError`` for what another node may serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm.errors import BadRequestError, NotServedError, OutOfOrderError
from swarm.wire import rpc
from swarm.wire.codec import COMPRESSIONS, NONE, all_finite, decode, encode
from swarm.wire.handover import TakeOver
from swarm.wire.records import parse_span_uid
from swarm.wire.rpc import Metadata, Request, arrange

from ..engine.scheduling.messages import Prefix
from .limits import Limits

STEP_TENSORS = 3
"""Hidden states, prompts and hypo_ids."""


@dataclass(frozen=True)
class Served:
    """What this node serves: blocks ``start:end`` of the model announced under ``prefix``, and LoRA adapters."""

    prefix: str
    start: int
    end: int
    hidden_size: int
    dtype: torch.dtype
    adapters: tuple[str, ...] = ()

    def blocks_of(self, uid: str) -> tuple[int, int]:
        """The blocks that a request names, as ``(first, last)`` with ``last`` excluded."""
        try:
            first, last = parse_span_uid(uid, self.prefix)
        except ValueError as error:
            raise BadRequestError(str(error)) from error
        if first < self.start or last > self.end:
            raise NotServedError(
                f"blocks {first}:{last} are not served here; this node has {self.start}:{self.end} of {self.prefix}"
            )
        return first, last

    def check_adapter(self, name: str) -> None:
        """Refuses an adapter that isn't here; the empty name is none."""
        if name and name not in self.adapters:
            here = ", ".join(map(repr, self.adapters)) or "none"
            raise NotServedError(f"adapter {name!r} is not served here; this node has {here}")


class Arrived(NamedTuple):
    """A message of a session, its fields as they came, and what they say. ``let_go`` is called when it is done with."""

    request: Request
    fields: dict[str, Any]
    metadata: Metadata
    let_go: Callable[[], None]


def open_message(request: Request, let_go: Callable[[], None] = lambda: None) -> Arrived:
    """A message of a session, whose tensors are read when its turn comes.

    Raises:
        BadRequestError: it can't be read; it has been let go.
    """
    try:
        fields = rpc.load(request.metadata)
        return Arrived(request, fields, rpc.parse(fields), let_go)
    except BaseException:
        let_go()
        raise


@dataclass(frozen=True)
class Opening:
    """What the first message of a session asks for."""

    first: int
    last: int
    rows: int
    max_length: int
    left_padding: tuple[int, ...]
    prefix: Prefix | None = None
    adapter: str = ""
    handover_key: bytes = b""
    take_over: TakeOver | None = None
    pusher: PeerID | None = None


@dataclass(frozen=True)
class StepInput:
    """A step from column ``start`` on: hidden ``[rows, T, H]``, prompts ``[blocks, rows or 1, P, H]``, hypo_ids
    ``[rows]``."""

    start: int
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    hypo_ids: torch.Tensor | None


def check_opening(arrived: Arrived, served: Served, limits: Limits) -> Opening:
    """Checks the message that opens a session."""
    request, _, metadata, _ = arrived
    first, last = served.blocks_of(request.uid)
    served.check_adapter(metadata.active_adapter)
    if metadata.max_length is None:
        raise BadRequestError("the message that opens a session needs max_length")
    if metadata.max_length > limits.max_length:
        raise BadRequestError(
            f"a session of {metadata.max_length} tokens is too long for this node: its limit is {limits.max_length}; "
            "shorten the prompt, ask for fewer tokens, or serve with a larger --cache-tokens"
        )
    rows = request.tensors[0].size[0] if request.tensors and request.tensors[0].size else 1
    if not 1 <= rows <= limits.max_rows:
        raise BadRequestError(f"{rows} rows in a session; the limit is {limits.max_rows}")
    padding = metadata.left_padding
    if padding and (len(padding) != rows or max(padding) > metadata.max_length):
        raise BadRequestError("left_padding is to have one number per row, none larger than max_length")
    prefix = None
    if metadata.prefix_context and metadata.take_over is None:
        if len(metadata.page_names) not in (0, rows):
            raise BadRequestError("page_names is to have one item per row")
        prefix = Prefix(metadata.prefix_context, metadata.names)
    return Opening(
        first,
        last,
        rows,
        metadata.max_length,
        padding,
        prefix,
        metadata.active_adapter,
        metadata.handover_key,
        metadata.take_over,
        metadata.pusher,
    )


def read_step(arrived: Arrived, opening: Opening, served: Served, limits: Limits, *, position: int) -> StepInput:
    """Decodes and checks a step of a session that has done ``position`` columns."""
    request, _, metadata, _ = arrived
    hidden, prompts, hypo_ids = _tensors(request, metadata, served, limits, count=STEP_TENSORS)
    if metadata.active_adapter not in ("", opening.adapter):
        raise BadRequestError("the adapter of a session can't change: open another session for another adapter")
    start = position if metadata.start is None else metadata.start
    if start > position:
        raise OutOfOrderError(f"out of order: the step starts at {start}, the session is at {position}")
    _check_hidden(hidden, served, limits)
    rows, columns, _ = hidden.shape
    if rows != opening.rows:
        raise BadRequestError(f"the session has {opening.rows} rows; the step has {rows}")
    if start + columns > opening.max_length:
        raise BadRequestError(f"the step ends at {start + columns}; the session was opened for {opening.max_length}")
    return StepInput(
        start,
        hidden,
        _check_prompts(prompts, rows, columns, opening.last - opening.first, served),
        _check_hypo_ids(hypo_ids, rows),
    )


@dataclass(frozen=True)
class DenseInput:
    """A forward or, with ``grad`` (of the output, ``[rows, T, H]``), a backward through the blocks ``first:last``."""

    first: int
    last: int
    hidden: torch.Tensor
    grad: torch.Tensor | None
    prompts: torch.Tensor | None
    adapter: str
    compression: tuple[int, ...]

    def encode(self, outputs: Sequence[torch.Tensor]) -> list[runtime_pb2.Tensor]:
        """``outputs`` as the client wants them."""
        wanted = self.compression or (NONE,) * len(outputs)
        if len(wanted) != len(outputs) or any(compression not in COMPRESSIONS for compression in wanted):
            raise BadRequestError(f"output_compression is to be {len(outputs)} of {list(COMPRESSIONS)}")
        return [encode(output, compression) for output, compression in zip(outputs, wanted, strict=True)]


def read_dense(request: Request, served: Served, limits: Limits, *, backward: bool) -> DenseInput:
    """Decodes and checks a forward or a backward."""
    metadata = rpc.parse(rpc.load(request.metadata))
    first, last = served.blocks_of(request.uid)
    served.check_adapter(metadata.active_adapter)
    hidden, *grads, prompts = _tensors(request, metadata, served, limits, count=3 if backward else 2)
    for tensor in (hidden, *grads):
        _check_hidden(tensor, served, limits)
    if grads and grads[0].shape != hidden.shape:
        raise BadRequestError("the gradient has another shape than the hidden states")
    return DenseInput(
        first,
        last,
        hidden,
        grads[0] if grads else None,
        _check_prompts(prompts, hidden.shape[0], hidden.shape[1], last - first, served),
        metadata.active_adapter,
        metadata.output_compression,
    )


def _tensors(
    request: runtime_pb2.ExpertRequest, metadata: Metadata, served: Served, limits: Limits, *, count: int
) -> list[torch.Tensor]:
    if not 1 <= len(request.tensors) <= 8:
        raise BadRequestError(f"the request has {len(request.tensors)} tensors")
    limit = limits.max_step_tokens * served.hidden_size
    return arrange(
        [decode(tensor, max_elements=limit) for tensor in request.tensors], metadata.args_structure, count=count
    )[:count]


def _check_hidden(hidden: torch.Tensor, served: Served, limits: Limits) -> None:
    if hidden.ndim != 3 or hidden.shape[-1] != served.hidden_size or not hidden.is_floating_point():
        raise BadRequestError(
            f"hidden states are [rows, tokens, {served.hidden_size}] of a floating dtype; "
            f"got {tuple(hidden.shape)} of {hidden.dtype}"
        )
    rows, columns, _ = hidden.shape
    if rows > limits.max_rows or rows * columns > limits.max_step_tokens:
        raise BadRequestError(
            f"{rows} rows of {columns} tokens in one message; the limit is {limits.max_step_tokens} tokens in all: "
            "send them in smaller steps"
        )
    if not all_finite(hidden):
        raise BadRequestError("hidden states are not finite")


def _check_prompts(prompts: torch.Tensor, rows: int, columns: int, blocks: int, served: Served) -> torch.Tensor | None:
    if prompts.numel() == 0:
        return None
    shape: Sequence[int] = prompts.shape
    if (
        len(shape) != 4
        or shape[0] != blocks
        or shape[1] not in (1, rows)
        or shape[2] > columns
        or shape[3] != served.hidden_size
        or not prompts.is_floating_point()
        or not all_finite(prompts)
    ):
        raise BadRequestError(
            f"prompts are finite [{blocks}, 1 or {rows}, up to {columns}, {served.hidden_size}]; got {tuple(shape)}"
        )
    return prompts


def _check_hypo_ids(hypo_ids: torch.Tensor, rows: int) -> torch.Tensor | None:
    if hypo_ids.numel() == 0:
        return None
    if hypo_ids.dtype != torch.int64 or tuple(hypo_ids.shape) != (rows,):
        raise BadRequestError(f"hypo_ids are [{rows}] int64; got {tuple(hypo_ids.shape)} of {hypo_ids.dtype}")
    if int(hypo_ids.min()) < 0 or int(hypo_ids.max()) >= rows:
        raise BadRequestError(f"hypo_ids are row numbers from 0 to {rows - 1}")
    return hypo_ids
