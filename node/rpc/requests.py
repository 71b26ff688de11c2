"""Messages that arrive, checked and decoded before anything is allocated or computed, as what the engine takes.
Pure functions that raise ``BadRequestError``, or ``NotServedError`` for what another node may serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hivemind.p2p import PeerID
from hivemind.proto.runtime_pb2 import Tensor

from swarm.errors import BadRequestError, NotServedError, OutOfOrderError
from swarm.wire.codec import all_finite, decode
from swarm.wire.records import parse_span_uid, span_uid
from swarm.wire.rpc import Metadata, Request, arrange, dump, load, parse

from ..engine.scheduling.session import Prefix
from .limits import Limits


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


class Message(NamedTuple):
    """A request, and what its metadata says."""

    request: Request
    fields: dict[str, Any]
    metadata: Metadata

    @classmethod
    def of(cls, request: Request) -> Message:
        """Reads the metadata."""
        fields = load(request.metadata)
        return cls(request, fields, parse(fields))

    def passed_on(self, output: Tensor, prefix: str) -> tuple[PeerID, Request]:
        """The next of ``next_servers``, and the step as that one gets it: with this node's ``output`` as input."""
        hop, *rest = self.metadata.next_servers
        fields = dict(
            self.fields, session_id=hop.session_id, next_servers=[each.to_tuple() for each in rest], pushed=True
        )
        uid, tensors = span_uid(prefix, hop.start, hop.end), [output, *self.request.tensors[1:]]
        return hop.peer_id, Request(uid=uid, tensors=tensors, metadata=dump(fields))


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


@dataclass(frozen=True)
class Step:
    """Hidden ``[rows, T, H]`` from column ``start`` on, hypo_ids ``[rows]``, prompts ``[blocks, rows or 1, P, H]``, and
    of each row the names of the pages that the step completes."""

    hidden: torch.Tensor
    start: int
    hypo_ids: torch.Tensor | None
    prompts: torch.Tensor | None
    names: list[list[bytes]]


@dataclass(frozen=True)
class Forward:
    """Hidden ``[rows, T, H]`` for the blocks ``first:last``, without a session; prompts as in a step."""

    first: int
    last: int
    adapter: str
    hidden: torch.Tensor
    prompts: torch.Tensor | None


@dataclass(frozen=True)
class Backward(Forward):
    """And the gradient of the output, of the same shape."""

    grad: torch.Tensor


def read_opening(message: Message, served: Served, limits: Limits) -> Opening:
    """Checks the message that opens a session."""
    request, _, metadata = message
    first, last, adapter = _where(message, served)
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
    if metadata.prefix_context:
        if len(metadata.page_names) not in (0, rows):
            raise BadRequestError("page_names is to have one item per row")
        prefix = Prefix(metadata.prefix_context, metadata.names)
    return Opening(first, last, rows, metadata.max_length, padding, prefix, adapter)


def read_step(message: Message, opening: Opening, served: Served, limits: Limits, *, position: int) -> Step:
    """Checks and decodes a step of a session that has done ``position`` columns."""
    metadata = message.metadata
    hidden, prompts, hypo_ids = _tensors(message, served, limits, count=3)
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
    return Step(
        hidden,
        start,
        prompts=_check_prompts(prompts, hidden, opening.last - opening.first, served),
        hypo_ids=_check_hypo_ids(hypo_ids, rows),
        names=[list(row) for row in metadata.names],
    )


def read_forward(message: Message, served: Served, limits: Limits) -> Forward:
    """Checks and decodes a forward."""
    first, last, adapter = _where(message, served)
    hidden, prompts = _tensors(message, served, limits, count=2)
    _check_hidden(hidden, served, limits)
    return Forward(first, last, adapter, hidden, _check_prompts(prompts, hidden, last - first, served))


def read_backward(message: Message, served: Served, limits: Limits) -> Backward:
    """Checks and decodes a backward."""
    first, last, adapter = _where(message, served)
    hidden, grad, prompts = _tensors(message, served, limits, count=3)
    _check_hidden(hidden, served, limits)
    _check_hidden(grad, served, limits)
    if grad.shape != hidden.shape:
        raise BadRequestError("the gradient has another shape than the hidden states")
    return Backward(first, last, adapter, hidden, _check_prompts(prompts, hidden, last - first, served), grad)


def _where(message: Message, served: Served) -> tuple[int, int, str]:
    """The blocks that a message is for, as ``(first, last)``, and the adapter."""
    adapter = message.metadata.active_adapter
    first, last = served.blocks_of(message.request.uid)
    served.check_adapter(adapter)
    return first, last, adapter


def _tensors(message: Message, served: Served, limits: Limits, *, count: int) -> list[torch.Tensor]:
    tensors = message.request.tensors
    if not 1 <= len(tensors) <= 8:
        raise BadRequestError(f"the request has {len(tensors)} tensors")
    limit = limits.max_step_tokens * served.hidden_size
    decoded = [decode(tensor, max_elements=limit) for tensor in tensors]
    return arrange(decoded, message.metadata.args_structure, count=count)[:count]


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


def _check_prompts(prompts: torch.Tensor, hidden: torch.Tensor, blocks: int, served: Served) -> torch.Tensor | None:
    if prompts.numel() == 0:
        return None
    rows, columns, _ = hidden.shape
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
