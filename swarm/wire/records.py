"""What nodes write about themselves into the DHT: the records of Petals 2.2, with our additions in one extra field.

Key ``{prefix}.{block}``, subkey the PeerID in base58, value ``(state, throughput, extra)``. Everything read here comes
from strangers, so :meth:`ServerInfo.from_tuple` checks each field and refuses the record rather than guess.

Petals counts free KV cache by single keys and values in single blocks: a token takes two of them in each block. Nobody
but :meth:`ServerInfo.from_tuple` and :meth:`ServerInfo.to_tuple` sees that unit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

UID_DELIMITER = "."
CHAIN_DELIMITER = " "
_KEY_AND_VALUE = 2


class ServerState(enum.IntEnum):
    """Petals' states of a server. Only ``ONLINE`` ones take sessions."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


@dataclass(frozen=True)
class Offer:
    """What a node of ours offers beyond Petals. Travels in the record's field ``swarm``, which Petals ignores.

    Attributes:
        fingerprint: names the model's shape; nodes that disagree on it don't serve the same model.
        push_stream: takes pushes over one open stream for all sessions (``rpc_push_stream``).
        left_padding: sessions may have rows that start later (``left_padding`` in the opening message).
        sessions: sessions open when the record was written.
        started: when the node came up, in seconds since the epoch: a ban from before that is void.
        cache_tokens_total: size of the KV cache in tokens.
        max_rows: of a session or a request, at most; 0: it doesn't say.
        max_step_tokens: rows × columns of one message, at most; 0: it doesn't say.
        deterministic: a session's results are the same to the last bit whoever else uses the node.
        manifest: the root of the manifest of its weights, if it has made or got one; nodes with different ones serve
            different weights.
        adapters: by the names of its LoRA adapters a hash of each, as there may be several of one name.
    """

    fingerprint: str = ""
    push_stream: bool = False
    left_padding: bool = False
    sessions: int = 0
    started: float = 0.0
    cache_tokens_total: int = 0
    max_rows: int = 0
    max_step_tokens: int = 0
    deterministic: bool = False
    manifest: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Offer:
        """Reads the known fields.

        Raises:
            ValueError: a field has another type than it should.
        """
        fields: dict[str, Any] = {}
        for name in ("fingerprint", "manifest"):
            fields[name] = _typed(source.get(name, ""), str, name)
        for name in ("push_stream", "left_padding", "deterministic"):
            fields[name] = _typed(source.get(name, False), bool, name)
        for name in ("sessions", "cache_tokens_total", "max_rows", "max_step_tokens"):
            fields[name] = _natural(source.get(name, 0), name)
        fields["started"] = _number(source.get("started", 0.0), "started")
        hashes = _typed(source.get("adapters", {}), dict, "adapters")
        fields["adapters"] = {_typed(key, str, "adapters"): _typed(hashes[key], str, "adapters") for key in hashes}
        return cls(**fields)


@dataclass(frozen=True)
class ServerInfo:
    """One server's record. The field names are those of the wire; the ``*_rps`` are rows per second.

    Attributes:
        throughput: requests per second, the smaller of network and compute.
        inference_rps: decode rows per second through one block.
        cache_tokens_left: tokens that still fit into the KV cache, with their keys and values in all of the blocks
            ``start_block:end_block``; ``None`` without these.
        next_pings: round-trip seconds to peers that serve the following blocks.
        offer: ``None`` for a Petals server.
    """

    state: ServerState
    throughput: float
    start_block: int | None = None
    end_block: int | None = None
    public_name: str | None = None
    version: str | None = None
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    adapters: tuple[str, ...] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None
    cache_tokens_left: int | None = None
    next_pings: Mapping[str, float] | None = None
    offer: Offer | None = field(default=None)

    def names(self, block: int) -> bool:
        """Whether a record found at ``block`` still holds: right after a node has moved there are some that don't."""
        return self.start_block is None or self.end_block is None or self.start_block <= block < self.end_block

    def cache_tokens_for(self, blocks: int) -> int | None:
        """Tokens for which a session through ``blocks`` (1 or more) of the server's blocks finds room.

        A page of our nodes covers all of their blocks; a session takes less of a Petals server the fewer it uses.
        """
        if self.cache_tokens_left is None or self.offer is not None:
            return self.cache_tokens_left
        return self.cache_tokens_left * self._num_blocks() // blocks

    def _num_blocks(self) -> int:
        """How many blocks the record is about; 0 if it doesn't say."""
        return 0 if self.start_block is None or self.end_block is None else max(0, self.end_block - self.start_block)

    def to_tuple(self) -> tuple[int, float, dict[str, Any]]:
        """The value as it stands in the DHT."""
        extra: dict[str, Any] = {name: getattr(self, name) for name in _EXTRA_FIELDS}
        if self.cache_tokens_left is not None:
            extra["cache_tokens_left"] = self.cache_tokens_left * _KEY_AND_VALUE * self._num_blocks()
        extra["adapters"] = list(self.adapters)
        if self.next_pings is not None:
            extra["next_pings"] = dict(self.next_pings)
        if self.offer is not None:
            extra["swarm"] = vars(self.offer)
        return int(self.state), float(self.throughput), extra

    @classmethod
    def from_tuple(cls, source: object) -> ServerInfo:
        """Reads a value from the DHT; unknown extra fields are ignored, as Petals does.

        Raises:
            ValueError: the value is not a record.
        """
        if not isinstance(source, (tuple, list)) or len(source) < 2:
            raise ValueError("a server record is (state, throughput, extra)")
        extra = source[2] if len(source) > 2 else {}
        if not isinstance(extra, Mapping):
            raise ValueError("the extra fields of a server record are a dict")
        fields: dict[str, Any] = {}
        for name in ("public_name", "version", "torch_dtype", "quant_type"):
            fields[name] = _optional(extra, name, lambda value, name: _typed(value, str, name))
        for name in ("network_rps", "forward_rps", "inference_rps"):
            fields[name] = _optional(extra, name, _number)
        for name in ("start_block", "end_block", "cache_tokens_left"):
            fields[name] = _optional(extra, name, _natural)
        fields["using_relay"] = _optional(extra, "using_relay", lambda value, name: _typed(value, bool, name))
        fields["adapters"] = _strings(extra.get("adapters") or ())
        fields["next_pings"] = _optional(extra, "next_pings", _pings)
        fields["offer"] = _optional(extra, "swarm", lambda value, name: Offer.from_dict(_typed(value, dict, name)))
        state = ServerState(_natural(source[0], "state"))
        info = cls(state=state, throughput=_number(source[1], "throughput"), **fields)
        if info.cache_tokens_left is None:
            return info
        blocks = info._num_blocks()
        left = info.cache_tokens_left // (_KEY_AND_VALUE * blocks) if blocks else None
        return replace(info, cache_tokens_left=left)


_EXTRA_FIELDS = (
    "start_block",
    "end_block",
    "public_name",
    "version",
    "network_rps",
    "forward_rps",
    "inference_rps",
    "torch_dtype",
    "quant_type",
    "using_relay",
    "cache_tokens_left",
    "next_pings",
)


def block_uid(prefix: str, block: int) -> str:
    """The DHT key of a block, also its name in RPCs."""
    return f"{prefix}{UID_DELIMITER}{block}"


def span_uid(prefix: str, start: int, end: int) -> str:
    """The name in RPCs of the blocks ``start:end``."""
    return CHAIN_DELIMITER.join(block_uid(prefix, block) for block in range(start, end))


def parse_span_uid(uid: str, prefix: str) -> tuple[int, int]:
    """The blocks that ``uid`` names, as ``(start, end)``.

    Raises:
        ValueError: not a chain of consecutive blocks of this prefix.
    """
    blocks = []
    for part in uid.split(CHAIN_DELIMITER):
        head, delimiter, tail = part.rpartition(UID_DELIMITER)
        if head != prefix or not delimiter or not tail.isdecimal():
            raise ValueError(f"{part[:80]!r} is no block of {prefix!r}")
        blocks.append(int(tail))
    if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        raise ValueError(f"the blocks {blocks[:8]} do not follow one another")
    return blocks[0], blocks[-1] + 1


def _optional(extra: Mapping[str, Any], name: str, check: Any) -> Any:
    value = extra.get(name)
    return None if value is None else check(value, name)


def _typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} is to be a {kind.__name__}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is to be a finite number that is not negative")
    return float(value)


def _natural(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is to be a whole number that is not negative")
    return int(value)


def _strings(value: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError("adapters is to be a list of strings")
    return tuple(value)


def _pings(value: Any, name: str) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError("next_pings is to be a dict")
    # an unreachable peer is recorded as infinity there; it says nothing that we need
    finite = {peer: rtt for peer, rtt in value.items() if isinstance(rtt, (int, float)) and math.isfinite(rtt)}
    return {_typed(peer, str, name): _number(rtt, name) for peer, rtt in finite.items()}
