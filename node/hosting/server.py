"""Starts a node: joins, chooses its blocks, and makes the :class:`Host` (``host.py``) that ``life.py`` runs until it is
told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import torch

from swarm import __version__
from swarm.compute.threads import in_thread
from swarm.model.fingerprint import fingerprint
from swarm.model.layout import parse_blocks
from swarm.model.model_source import ModelSource
from swarm.model.skeleton import build_skeleton
from swarm.network import dht
from swarm.network.peer import Peer
from swarm.wire.codec import dtype_name
from swarm.wire.records import Offer, ServerInfo, ServerState

from ..adapters.checkpoint import AdapterCheckpoint, open_adapter
from ..adapters.config import AdapterSpec, parse_specs
from ..engine.blocks.quantization import Keep, Scheme, describe, find_scheme
from ..output import Output
from ..rpc.budget import raise_file_limit
from ..settings import NodeSettings
from .agreement import disagreements, require_agreement
from .family_check import require_right_blocks
from .host import Host
from .invitation import say_reached
from .joining import join
from .life import run_until
from .means import Means
from .placement.balance import covered_by_others
from .placement.blocks import choose_span
from .placement.hardware import choose_devices, choose_dtype
from .placement.memory import Plan
from .placement.plan import place_blocks, plan_blocks
from .weights.find import find_source


async def serve(settings: NodeSettings, output: Output, stop: asyncio.Event) -> None:
    """Serves until ``stop`` is set.

    Raises:
        UsageError: what was asked for can't be done; the message says what to do.
    """

    async def leave(host: Host) -> None:
        output.event("leaving", "Leaving the swarm: finishing the steps under way…")
        await host.leave()

    raise_file_limit()
    await run_until(stop, lambda stack: _start(settings, output, stack), leave, Host.run)
    output.event("stopped", "Stopped.")


async def _start(settings: NodeSettings, output: Output, stack: AsyncExitStack) -> Host:
    devices = choose_devices(settings.device)
    specs = parse_specs(settings.adapters)
    source, peer, sharing = await find_source(settings, output, stack)
    await in_thread(lambda: require_right_blocks(source.model_type, output))
    dtype = choose_dtype(settings.dtype, source.dtype, devices[0])
    adapters = await in_thread(lambda: _open_adapters(specs, source, settings))
    joining = asyncio.ensure_future(_join(settings, source, peer, output, stack))  # while the memory is planned
    stack.push_async_callback(_end, joining)
    size = sum(adapter.block_bytes for adapter in adapters)
    plan, use = await in_thread(lambda: plan_blocks(settings, source, dtype, devices, size))
    scheme, keep = _quantizers(plan.quantization, devices[0], dtype)
    quantization = plan.quantization
    if source.quantization is not None:
        title = source.quantization.title
        quantization = quantization if keep is None else title
        text = f"The checkpoint is quantized ({title}): {describe(use, keep, dtype_name(dtype))}"
        output.event("checkpoint", text, format=title, packed=keep is not None)

    peer = await joining
    say_reached(output, peer)
    records = await dht.fetch(peer.dht, source.dht_prefix, source.num_blocks)
    offer = Offer(
        fingerprint=fingerprint(source.config),
        push_stream=True,
        left_padding=True,
        cache_tokens_total=plan.cache_tokens,
        deterministic=settings.deterministic,
        manifest=sharing.root if sharing is not None else "",
        adapters={adapter.name: adapter.digest for adapter in adapters},
    )
    await require_agreement(peer.p2p, disagreements(records, peer.peer_id, offer, source.dht_prefix))
    covered = covered_by_others(records, peer.peer_id)
    start, end, reason = _choose_blocks(settings, source, plan, covered)
    output.event(
        "blocks",
        f"Serving blocks {start}:{end} of {source.num_blocks} in {dtype_name(dtype)}, {reason}: {plan.reason}",
        blocks=[start, end],
        quantization=quantization,
        cache_tokens=plan.cache_tokens,
    )
    placed = place_blocks(devices, plan, end - start)
    means = Means(settings, output, peer, source, sharing, plan, dtype, scheme, keep, placed, adapters)
    host = Host(means, _make_record(settings, dtype, quantization, offer))
    stack.push_async_callback(host.close)
    if sharing is not None:
        await sharing.begin(stack)
    await host.take(start, end, covered)
    return host


async def _join(
    settings: NodeSettings, source: ModelSource, peer: Peer | None, output: Output, stack: AsyncExitStack
) -> Peer:
    if peer is None:
        peer = await join(settings, source, output)
        stack.push_async_callback(peer.stop)
    if peer.presence is not None:
        peer.presence.serve(source.dht_prefix)
    return peer


async def _end(task: asyncio.Future[Peer]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _open_adapters(
    specs: Sequence[AdapterSpec], source: ModelSource, settings: NodeSettings
) -> list[AdapterCheckpoint]:
    if not specs:
        return []
    skeleton = build_skeleton(source, source.dtype, attention="eager")
    return [open_adapter(spec, skeleton, token=settings.token, cache_dir=settings.cache_dir) for spec in specs]


def _quantizers(quantization: str, device: torch.device, dtype: torch.dtype) -> tuple[Scheme | None, Keep | None]:
    """What quantizes weights, and what keeps a checkpoint's packed: one of them at most."""
    if quantization in ("packed", "kernels"):
        return None, Keep(dtype, slow=quantization == "packed")
    return None if quantization == "none" else find_scheme(quantization, device, dtype), None


def _make_record(settings: NodeSettings, dtype: torch.dtype, quantization: str, offer: Offer) -> ServerInfo:
    """The node's record, but for its blocks and how fast it is."""
    return ServerInfo(
        state=ServerState.JOINING,
        throughput=0.0,
        public_name=settings.name,
        version=__version__,
        torch_dtype=dtype_name(dtype),
        quant_type=quantization,
        adapters=tuple(offer.adapters),
        offer=offer,
    )


def _choose_blocks(
    settings: NodeSettings, source: ModelSource, plan: Plan, covered: Sequence[float]
) -> tuple[int, int, str]:
    if settings.blocks is not None:
        return (*parse_blocks(settings.blocks, source.num_blocks), "as asked")
    return (*choose_span(covered, plan.num_blocks, source.inner_boundaries), "where the swarm is thinnest")
