"""The RPCs of a node and the metadata that goes with their messages. The names and fields are those of Petals 2.2.

Ours beyond Petals: ``rpc_push_stream``; ``left_padding`` and ``prefix_context`` in the message that opens a session,
and ``reused`` in its reply; ``start`` in steps; ``page_names`` in both; ``step_id``, ``push_failed``, ``queue_s`` and
``compute_s`` (seconds that a step waited and was computed) in replies. A peer that doesn't know a field ignores it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer

from ..errors import BadRequestError, MalformedError

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
MAX_NAMES = 4096
"""In one message."""
EMPTY = torch.empty(0)
EMPTY_INT64 = torch.empty(0, dtype=torch.int64)


def handle_name(method: str) -> str:
    """The libp2p protocol under which a method is served."""
    return f"TransformerConnectionHandler.{method}"


@dataclass(frozen=True)
class NextHop:
    """Where a node pushes its output: a session of a peer, and the blocks that the peer runs in it."""

    peer_id: PeerID
    session_id: str
    start: int
    end: int

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
        pushed: came from another node, not from the client.
        start: columns done before this step, if the client says so.
        left_padding: columns that each row ignores at its left.
        args_structure: where hidden states, prompts and hypo_ids stand among the tensors.
        active_adapter: name of a LoRA adapter.
        output_compression: how the client wants the answer encoded.
        alloc_timeout: seconds that the client is ready to wait for KV cache when it opens a session.
        prefix_context: what else decides the content of the session's cache than the inputs that the names stand for.
        page_names: for each row the names of its pages: in the message that opens a session those that the client would
            like to find there, in a step those that are full after it. Same name and context means same content.
    """

    session_id: str | None = None
    max_length: int | None = None
    step_id: str | None = None
    next_servers: tuple[NextHop, ...] = ()
    pushed: bool = False
    start: int | None = None
    left_padding: tuple[int, ...] = ()
    args_structure: Any = None
    active_adapter: str = ""
    output_compression: tuple[int, ...] = ()
    alloc_timeout: float = 0.0
    prefix_context: bytes = b""
    page_names: tuple[tuple[bytes, ...], ...] = ()


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
    return Metadata(
        session_id=_text(fields, "session_id"),
        max_length=_count(fields, "max_length"),
        step_id=_text(fields, "step_id"),
        next_servers=_hops(fields.get("next_servers")),
        pushed=bool(fields.get("pushed")),
        start=_count(fields, "start"),
        left_padding=_counts(fields, "left_padding"),
        args_structure=fields.get("args_structure"),
        active_adapter=_text(fields, "active_adapter") or "",
        output_compression=_counts(fields, "output_compression"),
        alloc_timeout=_seconds(fields, "alloc_timeout"),
        prefix_context=_bytes(fields, "prefix_context"),
        page_names=_names(fields, "page_names"),
    )


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


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > 1024):
        raise BadRequestError(f"{name} is to be a string")
    return value


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
        raise BadRequestError(f"{name} is to be a whole number that is not negative")
    return value


def _counts(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise BadRequestError(f"{name} is to be a list of whole numbers")
    return tuple(value)


def _seconds(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name) or 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise BadRequestError(f"{name} is to be a number of seconds")
    return float(value)


def _bytes(fields: Mapping[str, Any], name: str) -> bytes:
    value = fields.get(name) or b""
    if not isinstance(value, bytes) or len(value) > 64:
        raise BadRequestError(f"{name} is to be at most 64 bytes")
    return value


def _names(fields: Mapping[str, Any], name: str) -> tuple[tuple[bytes, ...], ...]:
    """Each row's names stand one after the other in one piece of bytes."""
    value = fields.get(name)
    if value is None:
        return ()
    if (
        not isinstance(value, (list, tuple))
        or not all(isinstance(row, bytes) and len(row) % NAME_BYTES == 0 for row in value)
        or sum(map(len, value)) > MAX_NAMES * NAME_BYTES
    ):
        raise BadRequestError(f"{name} is to be a list of rows of {NAME_BYTES}-byte names, {MAX_NAMES} at most")
    return tuple(tuple(row[at : at + NAME_BYTES] for at in range(0, len(row), NAME_BYTES)) for row in value)


@functools.lru_cache(maxsize=1024)
def _peer_id(text: str) -> PeerID:
    return PeerID.from_base58(text)  # the same few over and over, at a tenth of a millisecond each


def _hops(value: Any) -> tuple[NextHop, ...]:
    if not value:
        return ()
    try:
        hops = []
        for peer, session_id, start, end in value:
            if (
                not isinstance(session_id, str)
                or type(start) is not int
                or type(end) is not int
                or not 0 <= start < end
            ):
                raise ValueError("no hop")
            hops.append(NextHop(_peer_id(peer), session_id, start, end))
    except (TypeError, ValueError) as error:
        raise BadRequestError("next_servers is to be a list of (peer, session, start, end)") from error
    return tuple(hops)
