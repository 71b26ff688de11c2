"""``swarm-node status``: a table of the swarm, live or as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swarm import dht
from swarm.dht import RemoteSpan
from swarm.peer import Peer, PeerOptions
from swarm.records import ServerInfo, ServerState
from swarm.source import resolve


def holes(spans: list[RemoteSpan], num_blocks: int) -> list[tuple[int, int]]:
    """The ranges of blocks that nobody serves."""
    served = [False] * num_blocks
    for span in spans:
        served[span.start : span.end] = [True] * (span.end - span.start)
    ranges: list[tuple[int, int]] = []
    for block, there in enumerate(served):
        if there:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


async def show(
    model: str,
    initial_peers: tuple[str, ...],
    *,
    dht_prefix: str | None,
    as_json: bool,
    once: bool,
    interval: float,
    stop: asyncio.Event,
) -> None:
    """Shows the swarm until ``stop`` is set; with ``as_json`` or ``once``, one time."""
    source = resolve(model, dht_prefix=dht_prefix)
    peer = await Peer.start(PeerOptions(initial_peers=initial_peers, client=True))
    try:
        if as_json or once:
            spans = await _look(peer, source.dht_prefix, source.num_blocks)
            if as_json:
                print(json.dumps(_as_dict(source.name, source.num_blocks, spans)))
            else:
                Console().print(_table(source.name, source.num_blocks, spans))
            return
        with Live(console=Console(), refresh_per_second=4) as live:
            while not stop.is_set():
                live.update(
                    _table(source.name, source.num_blocks, await _look(peer, source.dht_prefix, source.num_blocks))
                )
                await asyncio.wait({asyncio.create_task(stop.wait())}, timeout=interval)
    finally:
        await peer.stop()


async def _look(peer: Peer, prefix: str, num_blocks: int) -> list[RemoteSpan]:
    blocks = await dht.fetch(peer.dht, prefix, num_blocks)
    spans = dht.spans_of(blocks, min_state=ServerState.JOINING).values()
    return sorted(spans, key=lambda span: (span.start, span.end, span.peer_id))


def _online(spans: list[RemoteSpan]) -> list[RemoteSpan]:
    return [span for span in spans if span.info.state == ServerState.ONLINE]


def _as_dict(model: str, num_blocks: int, spans: list[RemoteSpan]) -> dict[str, Any]:
    nodes = [
        {
            "peer_id": span.peer_id.to_base58(),
            "name": span.info.public_name,
            "state": span.info.state.name.lower(),
            "blocks": [span.start, span.end],
            "throughput": span.info.throughput,
            "cache_tokens_left": span.info.cache_tokens_left,
            "sessions": span.info.offer.sessions if span.info.offer is not None else None,
            "dtype": span.info.torch_dtype,
            "quantization": span.info.quant_type,
            "version": span.info.version,
        }
        for span in spans
    ]
    missing = [list(hole) for hole in holes(_online(spans), num_blocks)]
    return {"model": model, "num_blocks": num_blocks, "nodes": nodes, "holes": missing}


def _weights(info: ServerInfo) -> str:
    """How a node holds its weights: quantized, or in which dtype."""
    return info.quant_type if info.quant_type not in (None, "none") else info.torch_dtype or "?"


def _table(model: str, num_blocks: int, spans: list[RemoteSpan]) -> Group:
    table = Table(title=f"{model}: {num_blocks} blocks")
    for column in ("blocks", "node", "name", "state", "blocks/s", "free KV", "sessions", "weights", "version"):
        table.add_column(column)
    for span in spans:
        info = span.info
        sessions = str(info.offer.sessions) if info.offer is not None else "?"
        table.add_row(
            f"{span.start}:{span.end}",
            "…" + span.peer_id.to_base58()[-8:],
            info.public_name or "",
            info.state.name.lower(),
            f"{info.throughput:.0f}",
            str(info.cache_tokens_left) if info.cache_tokens_left is not None else "?",
            sessions,
            _weights(info),
            info.version or "?",
        )
    missing = holes(_online(spans), num_blocks)
    if missing:
        ranges = ", ".join(f"{start}:{end}" for start, end in missing)
        return Group(table, Text(f"Nobody serves blocks {ranges}: no text can be generated yet.", style="bold red"))
    return Group(table, Text("Every block is served.", style="green"))
