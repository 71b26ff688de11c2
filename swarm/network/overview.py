"""What a swarm looks like from outside: who serves what, what is free, what is missing, how fast it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import msgspec
from hivemind.p2p import P2PHandlerError

from ..errors import BadRequestError
from ..ranges import subtract
from ..wire import rpc
from ..wire.fields import read
from ..wire.peer_id import read_peer_id
from ..wire.records import ServerState
from . import dht
from .dht import RemoteSpan
from .info import ask_info
from .peer import Peer
from .reach import call_failed

_ASK_SECONDS = 2.0
_FIRST_ASK_SECONDS = 6.0  # as long as the network takes to find out that an address doesn't answer
METER = ("sessions", "waiting", "prefill_tokens", "decode_tokens", "busy_s", "cache_tokens", "cache_tokens_free")
"""What a node tells about itself in the field ``meter`` of its ``rpc_info``: :class:`Meter` says what they are."""
HOLE_PUNCHED = "hole-punched"  # a node that others reach through a relay, and this process directly
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Meter:
    """What a node counted until ``at`` (seconds of the asker's monotonic clock). The totals only grow.

    ``rtt`` is how long the question took, in seconds.
    """

    at: float
    rtt: float
    sessions: _Count
    waiting: _Count
    prefill_tokens: _Count
    decode_tokens: _Count
    busy_s: Annotated[float, msgspec.Meta(ge=0, lt=2**53)]
    cache_tokens: _Count
    cache_tokens_free: _Count


@dataclass(frozen=True)
class Rates:
    """What a node does a second: tokens of decode and prefill, and the share of the time that it computes (0 to 1)."""

    decode: float
    prefill: float
    busy: float


@dataclass(frozen=True)
class NodeView:
    """One node. ``None`` where it doesn't say; ``meter`` and ``rates`` only if it was asked itself, once and twice.

    ``cache_tokens_left`` is for sessions through all of its blocks.
    ``state`` is that of its record, or ``lost`` if it was asked and didn't answer; ``problem`` says how.
    """

    peer_id: str
    name: str | None
    state: str
    start: int
    end: int
    throughput: float
    cache_tokens_left: int | None
    cache_tokens_total: int | None
    sessions: int | None
    dtype: str | None
    quantization: str | None
    version: str | None
    relayed: bool
    started: float | None
    deterministic: bool = False
    adapters: tuple[str, ...] = ()
    reached: str = ""
    meter: Meter | None = None
    rates: Rates | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Overview:
    """A swarm that serves one model of ``num_blocks`` blocks; ``holes`` are the ranges that nobody serves who can be
    reached, as far as nodes were asked."""

    model: str
    prefix: str
    num_blocks: int
    nodes: tuple[NodeView, ...]
    holes: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        nodes = [{**asdict(node), "blocks": [node.start, node.end]} for node in self.nodes]
        holes = [list(hole) for hole in self.holes]
        return {**asdict(self), "nodes": nodes, "holes": holes}

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Overview:
        """From :meth:`to_dict`, as a gateway sends it.

        Raises:
            ValueError: fields are missing or of another kind.
        """
        return read(cls, source)


def find_holes(spans: Sequence[tuple[int, int]], num_blocks: int) -> tuple[tuple[int, int], ...]:
    """The ranges of blocks in none of ``spans``."""
    return tuple(subtract([(0, num_blocks)], spans))


def rates(before: Meter | None, after: Meter) -> Rates | None:
    """The rates between two looks; ``None`` without an earlier one, or if the node was restarted in between."""
    if before is None or after.at <= before.at or after.busy_s < before.busy_s:
        return None
    seconds = after.at - before.at
    return Rates(
        decode=(after.decode_tokens - before.decode_tokens) / seconds,
        prefill=(after.prefill_tokens - before.prefill_tokens) / seconds,
        busy=min(1.0, (after.busy_s - before.busy_s) / seconds),
    )


async def look(peer: Peer, model: str, prefix: str, num_blocks: int) -> Overview:
    """What the DHT says about ``model``, known there as ``prefix``. Nodes are ordered by their blocks."""
    records = await dht.fetch(peer.dht, prefix, num_blocks)
    spans = dht.spans_of(records, min_state=ServerState.JOINING).values()
    nodes = sorted(map(_view, spans), key=lambda node: (node.start, node.end, node.peer_id))
    return Overview(model, prefix, num_blocks, tuple(nodes), _holes(nodes, num_blocks))


async def measure(peer: Peer, overview: Overview, before: Overview | None = None) -> Overview:
    """``overview`` with the nodes asked themselves, all at once; rates are since ``before``.

    A node that doesn't answer, but did the last time, may just be slow, and counts as one that can be reached.
    """
    earlier = {node.peer_id: node for node in before.nodes} if before is not None else {}

    async def ask(node: NodeView) -> NodeView:
        known = earlier.get(node.peer_id)
        meter = None if known is None else known.meter
        answer = await _ask(peer, node.peer_id, _FIRST_ASK_SECONDS if known is None else _ASK_SECONDS)
        if isinstance(answer, str):
            return node if meter is not None else replace(node, state="lost", problem=answer)
        reached = HOLE_PUNCHED if peer.p2p.reaches_directly(node.peer_id) else node.reached
        return replace(node, meter=answer, rates=None if answer is None else rates(meter, answer), reached=reached)

    nodes = tuple(await asyncio.gather(*map(ask, overview.nodes)))
    return replace(overview, nodes=nodes, holes=_holes(nodes, overview.num_blocks))


def _holes(nodes: Sequence[NodeView], num_blocks: int) -> tuple[tuple[int, int], ...]:
    return find_holes([(node.start, node.end) for node in nodes if node.state == "online"], num_blocks)


def _view(span: RemoteSpan) -> NodeView:
    info, offer = span.info, span.info.offer
    return NodeView(
        peer_id=span.peer_id.to_base58(),
        name=info.public_name,
        state=info.state.name.lower(),
        start=span.start,
        end=span.end,
        throughput=info.throughput,
        cache_tokens_left=info.cache_tokens_left,
        cache_tokens_total=offer.cache_tokens_total if offer is not None else None,
        sessions=offer.sessions if offer is not None else None,
        dtype=info.torch_dtype,
        quantization=info.quant_type,
        version=info.version,
        relayed=bool(info.using_relay),
        started=offer.started if offer is not None else None,
        deterministic=offer is not None and offer.deterministic,
        adapters=info.adapters,
        reached=offer.reached if offer is not None else "",
    )


async def _ask(peer: Peer, peer_id: str, patience: float) -> Meter | str | None:
    """What a node says about itself; ``None`` if it counts nothing, as Petals' servers; text: why it didn't answer."""
    begin = time.monotonic()
    try:
        answer = await ask_info(peer.p2p, read_peer_id(peer_id), patience)
    except asyncio.TimeoutError:
        return f"no answer in {patience:.0f} s"
    except P2PHandlerError:
        return None  # it is there
    except Exception as error:
        return str(call_failed(error))
    now = time.monotonic()
    return _meter(answer.serialized_info, now, now - begin)


def _meter(raw: bytes, at: float, rtt: float) -> Meter | None:
    try:
        return read(Meter, {**rpc.load(raw)["meter"], "at": at, "rtt": rtt})
    except (BadRequestError, KeyError, TypeError, ValueError):
        return None  # Petals' servers count nothing
