"""What nodes write about themselves into the DHT: the records of Petals 2.2, with our additions in one extra field.

Key ``{prefix}.{block}``, subkey the PeerID in base58, value ``(state, throughput, extra)``. Everything read here comes
from strangers, so :meth:`ServerInfo.from_tuple` checks each field and refuses the record rather than guess.

Petals counts free KV cache by single keys and values in single blocks: a token takes two of them in each block. Nobody
but :meth:`ServerInfo.from_tuple` and :meth:`ServerInfo.to_tuple` sees that unit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import msgspec

from .fields import Number, read

UID_DELIMITER = "."
CHAIN_DELIMITER = " "
_KEY_AND_VALUE = 2
MAX_RPS = 1e6
"""Faster than any machine: who says more than that of itself is believed so much."""
_MAX_ENTRIES = 1024
_Label = Annotated[str, msgspec.Meta(max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


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
        reached: how others reach it, as it was told by peers who tried: ``direct``, ``relay``, ``unreachable``; else
            ``unknown``.
        relays: the addresses of the relays through which it is reached, ``/ip4/…/tcp/…/p2p/…``.
        adapters: by the names of its LoRA adapters a hash of each, as there may be several of one name.
    """

    fingerprint: _Label = ""
    push_stream: bool = False
    left_padding: bool = False
    sessions: _Count = 0
    started: Number = 0.0
    cache_tokens_total: _Count = 0
    max_rows: _Count = 0
    max_step_tokens: _Count = 0
    deterministic: bool = False
    manifest: _Label = ""
    reached: _Label = ""
    relays: Annotated[tuple[_Label, ...], msgspec.Meta(max_length=8)] = ()
    adapters: Annotated[Mapping[_Label, _Label], msgspec.Meta(max_length=_MAX_ENTRIES)] = field(default_factory=dict)


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
    throughput: Number
    start_block: _Count | None = None
    end_block: _Count | None = None
    public_name: _Label | None = None
    version: _Label | None = None
    network_rps: Number | None = None
    forward_rps: Number | None = None
    inference_rps: Number | None = None
    adapters: Annotated[tuple[_Label, ...], msgspec.Meta(max_length=_MAX_ENTRIES)] = ()
    torch_dtype: _Label | None = None
    quant_type: _Label | None = None
    using_relay: bool | None = None
    cache_tokens_left: _Count | None = None
    next_pings: Annotated[Mapping[_Label, Number], msgspec.Meta(max_length=_MAX_ENTRIES)] | None = None
    offer: Offer | None = None

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
        extra = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"adapters": list(self.adapters)}
        state, throughput, offer = extra.pop("state"), extra.pop("throughput"), extra.pop("offer")
        if self.cache_tokens_left is not None:
            extra["cache_tokens_left"] = self.cache_tokens_left * _KEY_AND_VALUE * self._num_blocks()
        if offer is not None:
            extra["swarm"] = asdict(offer)
        return int(state), float(throughput), extra

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
        fields = {**extra, "state": source[0], "throughput": source[1], "offer": extra.get("swarm")}
        if isinstance(pings := extra.get("next_pings"), Mapping):
            # an unreachable peer is recorded as infinity there; it says nothing that we need
            fields["next_pings"] = {
                peer: rtt for peer, rtt in pings.items() if isinstance(rtt, (int, float)) and math.isfinite(rtt)
            }
        info = read(cls, fields)
        speeds = {name: getattr(info, name) for name in ("throughput", "network_rps", "forward_rps", "inference_rps")}
        info = replace(info, **{name: min(speed, MAX_RPS) for name, speed in speeds.items() if speed is not None})
        if info.cache_tokens_left is None:
            return info
        blocks = info._num_blocks()
        left = info.cache_tokens_left // (_KEY_AND_VALUE * blocks) if blocks else None
        return replace(info, cache_tokens_left=left)


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
