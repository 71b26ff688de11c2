"""The life of a node: joins, chooses its blocks, loads them, serves, leaves."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import torch

from swarm import __version__, dht
from swarm.codec import dtype_name
from swarm.errors import UsageError, parse_blocks
from swarm.fingerprint import fingerprint
from swarm.node.adapter_checkpoint import AdapterCheckpoint, open_adapter
from swarm.node.adapter_config import AdapterSpec, parse_specs
from swarm.node.announcer import Announcer
from swarm.node.engine.acceleration import Acceleration, accelerate
from swarm.node.engine.adapters import put_adapters
from swarm.node.engine.deterministic import check, make_deterministic
from swarm.node.engine.engine import STATE_ROWS, Engine
from swarm.node.engine.quantization import Scheme, find_scheme, finish_block, quantized_bytes, schemes_on
from swarm.node.handler import Handler
from swarm.node.hardware import choose_devices, choose_dtype, free_memory
from swarm.node.life import run_until
from swarm.node.limits import Limits
from swarm.node.metrics import serve_metrics
from swarm.node.output import Output
from swarm.node.placement import Plan, Sizes, Wish, choose_start, coverage, plan_memory, share_blocks, usable_together
from swarm.node.requests import Served
from swarm.node.settings import NodeSettings
from swarm.node.sharing import find_source
from swarm.node.throughput import measure
from swarm.peer import Peer
from swarm.records import Offer, ServerInfo, ServerState
from swarm.skeleton import Span, build_skeleton, cache_bytes, fetch_span, load_span
from swarm.source import ModelSource
from swarm.threads import in_thread

LEAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Serving:
    """A node that is up."""

    handler: Handler
    announcer: Announcer

    async def leave(self) -> None:
        """Tells the swarm, finishes what is under way."""
        await asyncio.wait({asyncio.create_task(self.announcer.announce(ServerState.OFFLINE))}, timeout=3.0)
        await self.handler.leave(LEAVE_SECONDS)


async def serve(settings: NodeSettings, output: Output, stop: asyncio.Event) -> None:
    """Serves until ``stop`` is set.

    Raises:
        UsageError: what was asked for can't be done; the message says what to do.
    """

    async def leave(serving: Serving) -> None:
        output.event("leaving", "Leaving the swarm: finishing the steps under way…")
        await serving.leave()

    await run_until(stop, lambda stack: _start(settings, output, stack), leave)
    output.event("stopped", "Stopped.")


async def _start(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> Serving:
    devices = choose_devices(settings.device)
    specs = parse_specs(settings.adapters)
    source, peer, sharing = await find_source(settings, output, stack)
    if source.quantization is not None:
        text = f"The checkpoint is quantized ({source.quantization.title}): each block is dequantized when it is loaded"
        output.event("dequantize", text, format=source.quantization.title)
    dtype = choose_dtype(settings.dtype, source.dtype, devices[0])
    # before the swarm is touched
    adapters = await in_thread(lambda: _open_adapters(specs, source, settings))
    plan = await in_thread(lambda: _plan(settings, source, dtype, devices, adapters))
    scheme = None if plan.quantization == "none" else find_scheme(plan.quantization, devices[0], dtype)

    if peer is None:
        peer = await Peer.start(settings.peer)
        stack.push_async_callback(peer.stop)
    records = await dht.fetch(peer.dht, source.dht_prefix, source.num_blocks)
    shape = fingerprint(source.config)
    root = sharing.root if sharing is not None else ""
    _check_same_model(records, shape, root, source, peer)
    _check_same_adapters(records, adapters, peer)
    start, end, reason = _choose_blocks(settings, source, plan, records, peer)
    output.event(
        "blocks",
        f"Serving blocks {start}:{end} of {source.num_blocks} in {dtype_name(dtype)}, {reason}: {plan.reason}",
        blocks=[start, end],
        quantization=plan.quantization,
        cache_tokens=plan.cache_tokens,
    )

    offer = Offer(
        fingerprint=shape,
        push_stream=True,
        left_padding=True,
        started=time.time(),
        cache_tokens_total=plan.cache_tokens,
        deterministic=settings.deterministic,
        manifest=root,
        adapters={adapter.name: adapter.digest for adapter in adapters},
    )
    info = ServerInfo(
        state=ServerState.JOINING,
        throughput=0.0,
        start_block=start,
        end_block=end,
        public_name=settings.name,
        version=__version__,
        torch_dtype=dtype_name(dtype),
        quant_type=plan.quantization,
        adapters=tuple(offer.adapters),
        using_relay=settings.peer.relay,
        offer=offer,
    )
    repository = None if source.is_local else source.name
    announcer = Announcer(peer, source.dht_prefix, source.num_blocks, repository, info, period=settings.update_period)
    await announcer.announce(ServerState.JOINING)

    if sharing is not None:
        await sharing.begin(stack)
        await sharing.fetch(start, end)
    span = await _load(source, start, end, dtype, _place(devices, plan), scheme, output)
    if adapters:
        with output.stage("adapters", f"Loading adapters {', '.join(info.adapters)}"):
            await in_thread(lambda: put_adapters(span, adapters))
    if settings.deterministic:
        with output.stage("deterministic", "Making sure that results don't depend on the batch"):
            await in_thread(lambda: _make_deterministic(span, info.adapters))
    engine = Engine(
        span,
        cache_tokens=plan.cache_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        # recorded steps are padded to sizes that depend on who else is there
        acceleration=Acceleration() if settings.deterministic else await in_thread(lambda: accelerate(span)),
        deterministic=settings.deterministic,
        adapters=info.adapters,
    )
    engine.start()
    stack.callback(engine.stop)
    with output.stage("warm-up", "Warming up"):
        speed = await in_thread(lambda: measure(engine, start, end, source.hidden_size))

    served = Served(source.dht_prefix, start, end, source.hidden_size, dtype, info.adapters)
    limits = Limits(
        max_length=min(source.max_positions or plan.cache_tokens, plan.cache_tokens),
        step_timeout=settings.idle_timeout,
        idle_seconds=settings.idle_seconds,
    )
    handler = Handler(peer.p2p, engine, served, limits)
    await handler.register()
    if settings.metrics_port is not None:
        serve_metrics(engine, settings.metrics_port)
    announcer.watch(engine)
    await announcer.announce(
        ServerState.ONLINE,
        throughput=speed.inference_rps,
        inference_rps=speed.inference_rps,
        forward_rps=speed.forward_rps,
        offer=dataclasses.replace(offer, started=time.time()),
    )
    _say_ready(settings, source, peer, start, end, info.adapters, output)
    return Serving(handler, announcer)


async def _load(
    source: ModelSource,
    start: int,
    end: int,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    scheme: Scheme | None,
    output: Output,
) -> Span:
    if source.hub is not None:
        with output.stage("download", f"Downloading blocks {start}:{end}") as fetched:
            await in_thread(lambda: fetch_span(source, start, end, progress=lambda *done: fetched(*done)))
    with output.stage("load", f"Loading blocks {start}:{end}") as report:
        return await in_thread(
            lambda: load_span(
                source,
                start,
                end,
                dtype=dtype,
                device=devices,
                progress=lambda *done: report(*done),
                finish=lambda block: finish_block(block, scheme),
            )
        )


def _make_deterministic(span: Span, adapters: Sequence[str]) -> None:
    for block in span.blocks:
        make_deterministic(block)
    check(span, adapters)


def _place(devices: Sequence[torch.device], plan: Plan) -> list[torch.device]:
    """The device of each block of the plan."""
    shares = share_blocks(plan.num_blocks, [free_memory(device) for device in devices], plan.bytes_each)
    return [device for device, share in zip(devices, shares, strict=True) for _ in range(share)]


def _check_same_model(
    records: list[dict[Any, ServerInfo]], shape: str, root: str, source: ModelSource, peer: Peer
) -> None:
    for servers in records:
        for peer_id, info in servers.items():
            if info.offer is None or info.state == ServerState.OFFLINE or peer_id == peer.peer_id:
                continue
            what = ""
            if info.offer.fingerprint not in ("", shape):
                what = "a model of another shape"
            elif root and info.offer.manifest not in ("", root):
                what = f"other weights (manifest {info.offer.manifest}, here {root})"
            if what:
                raise UsageError(
                    f"another node serves {what} as {source.dht_prefix!r} in this swarm: check that "
                    "MODEL is the same everywhere, or name this one differently with --dht-prefix"
                )


def _check_same_adapters(
    records: list[dict[Any, ServerInfo]], adapters: Sequence[AdapterCheckpoint], peer: Peer
) -> None:
    for peer_id, info in (pair for servers in records for pair in servers.items()):
        if info.offer is None or info.state == ServerState.OFFLINE or peer_id == peer.peer_id:
            continue
        for adapter in adapters:
            if info.offer.adapters.get(adapter.name, adapter.digest) != adapter.digest:
                raise UsageError(
                    f"another node serves another adapter as {adapter.name!r} in this swarm: check that it is the same "
                    "one everywhere, or name this one differently with --adapters NAME=DIR_OR_ID"
                )


def _open_adapters(
    specs: Sequence[AdapterSpec], source: ModelSource, settings: NodeSettings
) -> list[AdapterCheckpoint]:
    if not specs:
        return []
    skeleton = build_skeleton(source, source.dtype, attention="eager")
    return [open_adapter(spec, skeleton, token=settings.token, cache_dir=settings.cache_dir) for spec in specs]


def _plan(
    settings: NodeSettings,
    source: ModelSource,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    adapters: Sequence[AdapterCheckpoint],
) -> Plan:
    """What fits into the memory of ``devices``, which are of one kind."""
    device = devices[0]
    if settings.quantization not in ("none", "auto"):
        find_scheme(settings.quantization, device, dtype)
    blocks = settings.num_blocks
    if settings.blocks is not None:
        start, end = parse_blocks(settings.blocks, source.num_blocks)
        blocks = end - start
    layers = build_skeleton(source, dtype, attention="eager").layers
    always = cache_bytes(source, dtype, tokens=0, rows=STATE_ROWS)  # states are always there, as weights are
    always += sum(adapter.block_bytes for adapter in adapters)
    kinds = {"none": None} | {scheme.name: scheme for scheme in schemes_on(device)}
    sizes = Sizes(
        num_blocks=source.num_blocks,
        block_bytes={
            name: always + max(quantized_bytes(block, kind) for block in layers) for name, kind in kinds.items()
        },
        token_bytes=cache_bytes(source, dtype, tokens=1, rows=0),
        positions=source.max_positions,
    )
    free = usable_together([free_memory(each) for each in devices], max(sizes.block_bytes.values()))
    return plan_memory(free, sizes, Wish(blocks, settings.quantization, settings.cache_tokens))


def _choose_blocks(
    settings: NodeSettings, source: ModelSource, plan: Plan, records: list[dict[Any, ServerInfo]], peer: Peer
) -> tuple[int, int, str]:
    if settings.blocks is not None:
        return (*parse_blocks(settings.blocks, source.num_blocks), "as asked")
    spans = dht.spans_of(records, min_state=ServerState.JOINING)
    others = [
        (span.start, span.end, max(span.info.throughput, 1.0))
        for span in spans.values()
        if span.peer_id != peer.peer_id
    ]
    start = choose_start(coverage(others, source.num_blocks), plan.num_blocks)
    return start, start + plan.num_blocks, "where the swarm is thinnest"


def _say_ready(
    settings: NodeSettings,
    source: ModelSource,
    peer: Peer,
    start: int,
    end: int,
    adapters: Sequence[str],
    output: Output,
) -> None:
    join = reachable(peer)
    adapted = [f"with LoRA adapters, by --adapter or model.active_adapter: {', '.join(adapters)}"] if adapters else []
    output.panel(
        "ready",
        f"Serving blocks {start}:{end} of {source.name}",
        [
            "Others join with:",
            f"  swarm-node serve {settings.model} --initial-peers {join}",
            "Generate with:",
            f"  swarm chat {settings.model} --initial-peers {join}",
            "or in Python:",
            f"  model = SwarmModelForCausalLM.from_pretrained({settings.model!r}, initial_peers=[{join!r}])",
            *adapted,
        ],
        maddrs=list(peer.addresses),
        peer_id=peer.peer_id.to_base58(),
        blocks=[start, end],
        model=source.name,
        adapters=list(adapters),
    )


def reachable(peer: Peer) -> str:
    """The address that others can use: not the loopback one, if there is another."""
    others = [address for address in peer.addresses if "/127.0.0.1/" not in address and "/::1/" not in address]
    return (others or peer.addresses)[0]
