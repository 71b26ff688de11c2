"""The RPCs of a node and the metadata that goes with their messages. The names and fields are those of Petals 2.2.

Ours beyond Petals: ``rpc_push_stream`` and ``rpc_handover``; ``left_padding``, ``prefix_context``, ``handover_key`` and
``take_over`` in the message that opens a session, and ``reused`` in its reply; ``start`` in steps; ``page_names`` in
both; ``step_id``, ``push_failed``, ``queue_s`` and ``compute_s`` (seconds that a step waited and was computed) in
replies. A peer that doesn't know a field ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import msgspec
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer

from ..errors import BadRequestError, MalformedError
from .fields import Natural, Number, read
from .handover import Key, TakeOver

if TYPE_CHECKING:  # the generated module has no types
    Request: TypeAlias = Any
    Response: TypeAlias = Any
else:
    Request, Response = runtime_pb2.ExpertRequest, runtime_pb2.ExpertResponse

INFERENCE = "rpc_inference"
PUSH = "rpc_push"
PUSH_STREAM = "rpc_push_stream"
FORWARD = "rpc_forward"
FORWARD_STREAM = "rpc_forward_stream"
BACKWARD = "rpc_backward"
BACKWARD_STREAM = "rpc_backward_stream"
INFO = "rpc_info"

MAX_UNARY_BYTES = 2**20
"""Larger tensors go over the streaming variant: a unary message is limited to 4 MiB by the daemon, half of it by
Petals, and Petals widens bfloat16 to twice the size."""
MAX_METADATA_BYTES = 2**18
NAME_BYTES = 16
NAMED_TOKENS = 16
"""Tokens of a row that one name in ``page_names`` stands for."""
MAX_HOPS = 256
MAX_NAMES = 4096
"""In one message."""
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_MAX_HOP_BLOCKS = 4096  # each is named one by one in what is sent there
EMPTY = torch.empty(0)
EMPTY_INT64 = torch.empty(0, dtype=torch.int64)


def handle_name(method: str) -> str:
    """The libp2p protocol under which a method is served."""
    return f"TransformerConnectionHandler.{method}"


class NextHop(NamedTuple):
    """Where a node pushes its output: a session of a peer, and the blocks that the peer runs in it."""

    peer_id: PeerID
    session_id: str
    start: Natural
    end: Natural

    def to_tuple(self) -> tuple[str, str, int, int]:
        """As it stands in ``next_servers``."""
        return self.peer_id.to_base58(), self.session_id, self.start, self.end


@dataclass(frozen=True)
class Metadata:
    """The metadata of a request, checked. What was not given has its default.

    Attributes:
        session_id: the client's name for this hop's session.
        max_length: columns that the session is to hold at most.
        step_id: the same at every hop; a step that comes twice (pushed and sent) is run once.
        next_servers: the hops that follow, nearest first.
        start: columns done before this step, if the client says so.
        left_padding: columns that each row ignores at its left.
        args_structure: where hidden states, prompts and hypo_ids stand among the tensors.
        active_adapter: name of a LoRA adapter.
        output_compression: how the client wants the answer encoded.
        alloc_timeout: seconds that the client is ready to wait for KV cache when it opens a session.
        prefix_context: what else decides the content of the session's cache than the inputs that the names stand for.
        page_names: for each row the names of its pages, one after the other: in the message that opens a session those
            that the client would like to find there, in a step those that are full after it. Same name and context
            means same content.
        handover_key: with this, another node may fetch what the session has in its cache.
        take_over: where to fetch what the session is to begin with.
        pusher: who but the client may put steps into the session, from now on. Not given: anybody, as Petals has it.
        pushed: the step comes from the hop before.
    """

    session_id: _Text | None = None
    max_length: _Count | None = None
    step_id: _Text | None = None
    next_servers: Annotated[tuple[NextHop, ...], msgspec.Meta(max_length=MAX_HOPS)] = ()
    start: _Count | None = None
    left_padding: tuple[_Count, ...] = ()
    args_structure: Any = None
    active_adapter: _Text = ""
    output_compression: tuple[_Count, ...] = ()
    alloc_timeout: Number = 0.0
    prefix_context: bytes = b""
    page_names: tuple[Any, ...] = ()  # of bytes
    handover_key: Key = b""
    take_over: TakeOver | None = None
    pusher: PeerID | None = None
    pushed: bool = False

    def __post_init__(self) -> None:
        if not all(0 < hop.end - hop.start <= _MAX_HOP_BLOCKS for hop in self.next_servers):
            raise ValueError(f"next_servers is to have hops of 1 to {_MAX_HOP_BLOCKS} blocks")
        if len(self.prefix_context) > 64:
            raise ValueError("prefix_context is to be at most 64 bytes")
        rows = self.page_names
        if (
            not all(isinstance(row, bytes) and len(row) % NAME_BYTES == 0 for row in rows)
            or sum(map(len, rows)) > MAX_NAMES * NAME_BYTES
        ):
            raise ValueError(f"page_names is to be a list of rows of {NAME_BYTES}-byte names, {MAX_NAMES} at most")

    @property
    def names(self) -> tuple[tuple[bytes, ...], ...]:
        """``page_names``, the names one by one."""
        return tuple(
            tuple(row[at : at + NAME_BYTES] for at in range(0, len(row), NAME_BYTES)) for row in self.page_names
        )


def dump(fields: Mapping[str, Any]) -> bytes:
    """Encodes metadata."""
    return MSGPackSerializer.dumps(dict(fields))


def load(raw: bytes) -> dict[str, Any]:
    """Decodes metadata that came from a peer.

    Raises:
        MalformedError: too large, or not a dict.
    """
    if not raw:
        return {}
    if len(raw) > MAX_METADATA_BYTES:
        raise MalformedError("the metadata is too large")
    try:
        fields = MSGPackSerializer.loads(raw)
    except Exception as error:
        raise MalformedError("the metadata is not msgpack") from error
    if not isinstance(fields, dict):
        raise MalformedError("the metadata is not a dict")
    return fields


def parse(fields: Mapping[str, Any]) -> Metadata:
    """Checks the metadata of a request.

    Raises:
        BadRequestError: a field has a type or value that it can't have.
    """
    try:
        return read(Metadata, fields)
    except ValueError as error:
        raise BadRequestError(f"metadata of a request: {error}") from error


def arrange(tensors: Sequence[torch.Tensor], args_structure: Any, *, count: int) -> list[torch.Tensor]:
    """Brings the tensors of a request into the order of its arguments.

    Petals packs positional arguments as ``((b"__T0", b"__T1", …), {})``: each mark is an index into the tensors.
    Without a structure they stand in order.

    Raises:
        BadRequestError: fewer than ``count`` arguments, or a structure that doesn't fit.
    """
    if args_structure is None:
        arranged: list[torch.Tensor] = list(tensors)
    else:
        try:
            positional, _ = args_structure
            arranged = [_marked(mark, tensors) for mark in positional]
        except (TypeError, ValueError, IndexError) as error:
            raise BadRequestError("args_structure does not fit the tensors") from error
    if len(arranged) < count:
        raise BadRequestError(f"the request needs {count} tensors; it has {len(arranged)}")
    return arranged


def _marked(mark: Any, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if mark is None:
        return EMPTY
    if not isinstance(mark, bytes) or not mark.startswith(b"__T") or not mark[3:].isdigit():
        raise ValueError("no mark of a tensor")
    return tensors[int(mark[3:])]
