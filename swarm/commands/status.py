"""``status`` and ``top``: a swarm as tables in a terminal, once or live, or as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..compute.threads import in_thread
from ..model.source import is_here, resolve
from ..network import dht
from ..network.lan.look import find_peers
from ..network.options import KeyOptions, LanOptions, PeerOptions
from ..network.overview import NodeView, Overview, look, measure
from ..network.peer import Peer
from ..ranges import describe
from ..weights.sharing.holders import possible_prefixes
from .options import View

_NOWHERE, _NO_KEY = LanOptions(), KeyOptions()
_SHADES = " ▁▂▃▄▅▆▇█"


async def watch(
    model: str,
    initial_peers: Sequence[str],
    *,
    lan: LanOptions = _NOWHERE,
    key: KeyOptions = _NO_KEY,
    dht_prefix: str | None,
    interval: float,
) -> AsyncIterator[Overview]:
    """A swarm as it is now, and again every ``interval`` seconds. Nodes are asked themselves too. Of a model that isn't
    here, the swarm's own list says how many blocks it has."""
    source = resolve(model, dht_prefix=dht_prefix) if is_here(model) else None
    if lan.wanted:
        names = possible_prefixes(model, dht_prefix) if source is None else [source.dht_prefix]
        _, initial_peers = await find_peers(lan, [names])
    peer = await Peer.start(PeerOptions(initial_peers=initial_peers, key=key, client=True))
    before: Overview | None = None
    try:
        if source is not None:
            prefix, count = source.dht_prefix, source.num_blocks
        else:
            prefix, count = await _find(peer, model, dht_prefix)
        while True:
            seen = await look(peer, model, prefix, count)
            before = await measure(peer, seen, before)
            yield before
            await asyncio.sleep(interval)
    finally:
        await peer.stop()


async def _find(peer: Peer, model: str, asked: str | None) -> tuple[str, int]:
    """The name in the DHT and the number of blocks of a model that isn't here."""
    listed = await dht.fetch_models(peer.dht)
    for prefix in possible_prefixes(model, asked):
        if prefix in listed:
            return prefix, listed[prefix]
    source = await in_thread(lambda: resolve(model, dht_prefix=asked))
    return source.dht_prefix, source.num_blocks


async def show(overviews: AsyncIterator[Overview], view: View, *, top: bool, stop: asyncio.Event) -> None:
    """Shows what comes until ``stop`` is set; with ``view.as_json`` or ``view.once``, the first only."""
    draw, console = top_view if top else status_view, Console()
    if view.as_json or view.once:
        overview = await anext(overviews)
        if view.as_json:
            print(json.dumps(overview.to_dict()))
        else:
            console.print(draw(overview))
        await overviews.aclose()  # type: ignore[attr-defined]
        return
    stopping = asyncio.ensure_future(stop.wait())
    with Live(console=console, auto_refresh=False, screen=top) as live:
        while not stop.is_set():
            coming = asyncio.ensure_future(anext(overviews))
            await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                await asyncio.wait({coming})
                break
            if console.is_terminal:
                live.update(draw(coming.result()), refresh=True)
            else:  # a pipe or a file: one after the other
                console.print(draw(coming.result()))
    stopping.cancel()
    await overviews.aclose()  # type: ignore[attr-defined]


def status_view(overview: Overview) -> Group:
    """A table of the nodes, and whether every block is served."""
    table = Table(title=f"{overview.model}: {overview.num_blocks} blocks")
    columns = ("blocks", "node", "name", "state", "reached", "blocks/s", "free KV", "sessions", "weights", "version")
    for column in columns:
        table.add_column(column)
    for node in overview.nodes:
        table.add_row(
            f"{node.start}:{node.end}",
            _short(node),
            node.name or "",
            node.state,
            node.reached or ("relay" if node.relayed else "?"),
            f"{node.throughput:.0f}",
            _known(node.cache_tokens_left if node.meter is None else node.meter.cache_tokens_free),
            _known(node.sessions if node.meter is None else node.meter.sessions),
            _format(node),
            node.version or "?",
        )
    return Group(table, _verdict(overview))


def top_view(overview: Overview) -> Group:
    """What each node does right now, and how well each block is served."""
    now = [node.rates for node in overview.nodes if node.rates is not None]
    ends = [node for node in overview.nodes if node.end == overview.num_blocks and node.rates is not None]
    made = sum(node.rates.decode for node in ends if node.rates is not None)  # every token passes the last block once
    busy = f"{sum(rate.busy for rate in now) / len(now):.0%} busy" if now else "measuring…"
    title = f"{overview.model}  {len(overview.nodes)} nodes  {made:.1f} tokens/s  {busy}"
    table = Table(expand=True, box=None)
    for column in ("blocks", "node", "tokens/s", "prefill/s", "busy", "sessions", "queue", "KV used", "rtt ms"):
        table.add_column(column, justify="left" if column in ("blocks", "node", "KV used") else "right")
    for node in overview.nodes:
        meter, rate = node.meter, node.rates
        table.add_row(
            f"{node.start}:{node.end}",
            f"{_short(node)} {node.name or ''}" + ("" if node.state == "online" else f" ({node.state})"),
            "?" if rate is None else f"{rate.decode:.1f}",
            "?" if rate is None else f"{rate.prefill:.1f}",
            "?" if rate is None else f"{rate.busy:.0%}",
            _known(node.sessions if meter is None else meter.sessions),
            "?" if meter is None else str(meter.waiting),
            "?" if meter is None else _bar(1 - meter.cache_tokens_free / max(1, meter.cache_tokens)),
            "?" if meter is None else f"{meter.rtt * 1e3:.1f}",
        )
    return Group(Text(title, style="bold"), coverage_line(overview), table, _verdict(overview))


def coverage_line(overview: Overview, width: int = 64) -> Text:
    """The model's blocks from left to right: the higher the bar, the more nodes serve them; ✗ where nobody does."""
    served = [0] * overview.num_blocks
    for node in overview.nodes:
        if node.state == "online":
            for block in range(node.start, node.end):
                served[block] += 1
    cells = min(width, overview.num_blocks)
    line = Text("blocks ")
    for cell in range(cells):
        part = served[cell * overview.num_blocks // cells : (cell + 1) * overview.num_blocks // cells]
        fewest = min(part)
        line.append("✗" if not fewest else _SHADES[min(fewest, 8)], style="green" if fewest else "bold red")
    return line


def _verdict(overview: Overview) -> Text:
    lost = [
        f"\n{_short(node)} ({node.start}:{node.end}) does not answer: {node.problem}."
        for node in overview.nodes
        if node.problem is not None
    ]
    if not overview.holes:
        return Text("".join(["Every block is served.", *lost]), style="yellow" if lost else "green")
    whom = " that can be reached" if lost else ""
    text = f"Nobody{whom} serves blocks {describe(overview.holes)}: no text can be generated yet."
    return Text("".join([text, *lost]), style="bold red")


def _short(node: NodeView) -> str:
    return "…" + node.peer_id[-8:]


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


def _format(node: NodeView) -> str:
    if node.quantization in (None, "none"):
        return node.dtype or "?"
    return str(node.quantization)


def _bar(share: float, width: int = 10) -> str:
    full = round(min(1.0, max(0.0, share)) * width)
    return "█" * full + "░" * (width - full) + f" {share:4.0%}"
