"""The life of a node: joins, chooses its blocks, loads them, serves, leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import torch
from hivemind.p2p import PeerID

from swarm import __version__
from swarm.compute.threads import in_thread
from swarm.errors import UsageError
from swarm.model.fingerprint import fingerprint
from swarm.model.layout import check_range, parse_blocks
from swarm.model.skeleton import block_caches, build_skeleton, packed_blocks
from swarm.model.source import ModelSource
from swarm.network import dht
from swarm.network.peer import Peer
from swarm.wire.codec import dtype_name
from swarm.wire.records import Offer, ServerInfo, ServerState

from ..adapters.checkpoint import AdapterCheckpoint, open_adapter
from ..adapters.config import AdapterSpec, parse_specs
from ..engine.blocks.quantization import Keep, Use, describe, find_scheme, quantized_bytes, schemes_on
from ..engine.engine import STATE_ROWS
from ..output import Output
from ..settings import NodeSettings
from .balance import covered_by_others
from .family_check import require_right_blocks
from .hardware import choose_devices, choose_dtype, free_memory
from .host import Host, Means
from .life import run_until
from .placement import Plan, Sizes, Wish, choose_span, plan_memory, share_blocks, usable_together, widest_mean
from .sharing import find_source


async def serve(settings: NodeSettings, output: Output, stop: asyncio.Event) -> None:
    """Serves until ``stop`` is set.

    Raises:
        UsageError: what was asked for can't be done; the message says what to do.
    """

    async def leave(host: Host) -> None:
        output.event("leaving", "Leaving the swarm: finishing the steps under way…")
        await host.leave()

    await run_until(stop, lambda stack: _start(settings, output, stack), leave, Host.run)
    output.event("stopped", "Stopped.")


async def _start(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> Host:
    devices = choose_devices(settings.device)
    specs = parse_specs(settings.adapters)
    source, peer, sharing = await find_source(settings, output, stack)
    await in_thread(lambda: require_right_blocks(source.model_type, output))
    dtype = choose_dtype(settings.dtype, source.dtype, devices[0])
    adapters = await in_thread(lambda: _open_adapters(specs, source, settings))
    joining = asyncio.ensure_future(_join(settings, peer, stack))  # while the memory is planned
    stack.push_async_callback(_end, joining)
    plan, use = await in_thread(lambda: _plan(settings, source, dtype, devices, adapters))
    kept = plan.quantization in ("packed", "kernels")
    scheme = None if kept or plan.quantization == "none" else find_scheme(plan.quantization, devices[0], dtype)
    keep = Keep(dtype, slow=plan.quantization == "packed") if kept else None
    if source.quantization is not None:
        text = f"The checkpoint is quantized ({source.quantization.title}): {describe(use, keep, dtype_name(dtype))}"
        output.event("checkpoint", text, format=source.quantization.title, packed=kept)

    peer = await joining
    records = await dht.fetch(peer.dht, source.dht_prefix, source.num_blocks)
    shape = fingerprint(source.config)
    root = sharing.root if sharing is not None else ""
    _check_same_model(records, shape, root, source, peer)
    quantization = source.quantization.title if kept and source.quantization is not None else plan.quantization
    _check_same_adapters(records, adapters, peer)
    covered = covered_by_others(records, peer.peer_id)
    start, end, reason = _choose_blocks(settings, source, plan, covered)
    output.event(
        "blocks",
        f"Serving blocks {start}:{end} of {source.num_blocks} in {dtype_name(dtype)}, {reason}: {plan.reason}",
        blocks=[start, end],
        quantization=quantization,
        cache_tokens=plan.cache_tokens,
    )
    offer = Offer(
        fingerprint=shape,
        push_stream=True,
        left_padding=True,
        cache_tokens_total=plan.cache_tokens,
        deterministic=settings.deterministic,
        manifest=root,
        adapters={adapter.name: adapter.digest for adapter in adapters},
    )
    info = ServerInfo(
        state=ServerState.JOINING,
        throughput=0.0,
        public_name=settings.name,
        version=__version__,
        torch_dtype=dtype_name(dtype),
        quant_type=quantization,
        adapters=tuple(offer.adapters),
        using_relay=settings.peer.relay,
        offer=offer,
    )
    means = Means(dtype, scheme, keep, plan, _place(devices, plan, end - start), adapters)
    host = Host(settings, output, peer, source, sharing, means, info)
    stack.push_async_callback(host.close)
    if sharing is not None:
        await sharing.begin(stack)
    await host.take(start, end, covered)
    return host


async def _join(settings: NodeSettings, peer: Peer | None, stack: AsyncExitStack) -> Peer:
    if peer is None:
        peer = await Peer.start(settings.peer)
        stack.push_async_callback(peer.stop)
    return peer


async def _end(task: asyncio.Future[Peer]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _place(devices: Sequence[torch.device], plan: Plan, num_blocks: int) -> list[torch.device]:
    """The device of each of the blocks, of which there are at most as many as planned."""
    shares = share_blocks(num_blocks, [free_memory(device) for device in devices], plan.bytes_each)
    return [device for device, share in zip(devices, shares, strict=True) for _ in range(share)]


def _check_same_model(
    records: list[dict[PeerID, ServerInfo]], shape: str, root: str, source: ModelSource, peer: Peer
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
    records: list[dict[PeerID, ServerInfo]], adapters: Sequence[AdapterCheckpoint], peer: Peer
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
) -> tuple[Plan, Mapping[str, Use]]:
    """What fits into the memory of ``devices``, which are of one kind; and what can be done with packed weights."""
    device = devices[0]
    if settings.quantization not in ("none", "auto", "checkpoint", "packed"):
        find_scheme(settings.quantization, device, dtype)
    count = settings.num_blocks
    first, last = 0, source.num_blocks
    if settings.blocks is not None:
        first, last = parse_blocks(settings.blocks, source.num_blocks)
        check_range(first, last, source.inner_boundaries)
        count = last - first
    wanted = slice(first, last)
    layers = build_skeleton(source, dtype, attention="eager").layers
    caches = block_caches(source, dtype)
    adapter_bytes = sum(adapter.block_bytes for adapter in adapters)
    # there as long as weights are
    always = [adapter_bytes + cache.bytes(tokens=0, rows=STATE_ROWS, itemsize=dtype.itemsize) for cache in caches]
    kinds = {"none": None} | {scheme.name: scheme for scheme in schemes_on(device)}
    block_bytes = {name: [quantized_bytes(block, kind) for block in layers] for name, kind in kinds.items()}
    use: dict[str, Use] = {}
    if source.quantization is not None and source.quantization.formats:
        packed = list(zip(layers, packed_blocks(source), strict=True))
        for block, weights in packed:
            use |= Keep(dtype, slow=True).uses(block, weights, device)
        for name, slow in (("packed", True), ("kernels", False)):
            keep = Keep(dtype, slow)
            block_bytes[name] = [keep.size(block, weights, device) for block, weights in packed]
    fastest = "none" if Use.KERNEL not in use.values() else "kernels" if Use.SLOW in use.values() else "packed"
    if set(use.values()) <= {Use.NONE}:
        if settings.quantization == "packed":
            raise UsageError("--quantization packed: no weights of this checkpoint can stay packed here; leave it out")
        block_bytes.pop("packed", None)  # nothing would be packed
    if fastest != "kernels":
        block_bytes.pop("kernels", None)
    needed = {
        name: [more + size for more, size in zip(always, sizes, strict=True)][wanted]
        for name, sizes in block_bytes.items()
    }
    token_bytes = [cache.bytes(tokens=1, rows=0, itemsize=dtype.itemsize) for cache in caches][wanted]
    free = [free_memory(each) for each in devices]
    early = source.store is not None

    def plan(blocks: int) -> Plan:
        """If a block needs what it does in a span of so many. A device of several may get just the largest."""
        together = blocks if len(devices) == 1 else 1
        sizes = Sizes(
            num_blocks=source.num_blocks,
            block_bytes={name: widest_mean(each, together) for name, each in needed.items()},
            token_bytes=max(1, widest_mean(token_bytes, together)),
            positions=source.max_positions,
            fastest=fastest,
        )
        usable = usable_together(free, max(sizes.block_bytes.values()))
        return plan_memory(usable, sizes, Wish(count, settings.quantization, settings.cache_tokens, early))

    if count is not None:
        return plan(min(count, source.num_blocks)), use
    plans = ((blocks, plan(blocks)) for blocks in range(source.num_blocks, 0, -1))
    return next(replace(made, num_blocks=blocks) for blocks, made in plans if made.num_blocks >= blocks), use


def _choose_blocks(
    settings: NodeSettings, source: ModelSource, plan: Plan, covered: Sequence[float]
) -> tuple[int, int, str]:
    if settings.blocks is not None:
        return (*parse_blocks(settings.blocks, source.num_blocks), "as asked")
    return (*choose_span(covered, plan.num_blocks, source.inner_boundaries), "where the swarm is thinnest")
