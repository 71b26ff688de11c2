"""What of a model fits into this machine: reads the sizes of both, with which ``memory.py`` plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from swarm.errors import UsageError
from swarm.model.empty_span import block_caches
from swarm.model.layout import check_range, parse_blocks
from swarm.model.model_source import ModelSource
from swarm.model.skeleton import build_skeleton
from swarm.model.tensors import packed_blocks

from ...engine.blocks.quantization import Keep, Use, find_scheme, quantized_bytes, schemes_on
from ...engine.engine import STATE_ROWS
from ...settings import NodeSettings
from .hardware import free_memory
from .memory import Plan, Sizes, Wish, plan_memory, share_blocks, usable_together, widest_mean


@dataclass(frozen=True)
class _Weights:
    """Bytes of each block's weights by quantization, as in :class:`Sizes`; how they are computed with fastest; and what
    can be done with packed ones, by what they are called."""

    bytes: Mapping[str, Sequence[int]]
    fastest: str
    use: Mapping[str, Use]


def plan_blocks(
    settings: NodeSettings,
    source: ModelSource,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    adapter_bytes: int = 0,
) -> tuple[Plan, Mapping[str, Use]]:
    """What fits into the memory of ``devices``, which are of one kind; and what can be done with packed weights.

    Args:
        adapter_bytes: of LoRA adapters, in each block.

    Raises:
        UsageError: what was asked for doesn't fit, or can't be had.
        ModelError: the model can't be served.
    """
    if settings.quantization not in ("none", "auto", "checkpoint", "packed"):
        find_scheme(settings.quantization, devices[0], dtype)
    first, last, count = 0, source.num_blocks, settings.num_blocks
    if settings.blocks is not None:
        first, last = parse_blocks(settings.blocks, source.num_blocks)
        check_range(first, last, source.inner_boundaries)
        count = last - first
    layers = build_skeleton(source, dtype, attention="eager").layers
    caches = block_caches(source, dtype)[first:last]
    weights = _weights(layers, source, dtype, devices[0], settings.quantization)
    # there as long as weights are
    always = [adapter_bytes + cache.bytes(tokens=0, rows=STATE_ROWS, itemsize=dtype.itemsize) for cache in caches]
    needed = {
        name: [more + size for more, size in zip(always, sizes[first:last], strict=True)]
        for name, sizes in weights.bytes.items()
    }
    token_bytes = [cache.bytes(tokens=1, rows=0, itemsize=dtype.itemsize) for cache in caches]
    free = [free_memory(device) for device in devices]
    wish = Wish(count, settings.quantization, settings.cache_tokens, early=source.store is not None)

    def plan(blocks: int) -> Plan:
        """If a block needs what it does in a span of so many. A device of several may get just the largest."""
        together = blocks if len(devices) == 1 else 1
        sizes = Sizes(
            num_blocks=source.num_blocks,
            block_bytes={name: widest_mean(each, together) for name, each in needed.items()},
            token_bytes=max(1, widest_mean(token_bytes, together)),
            positions=source.max_positions,
            fastest=weights.fastest,
        )
        return plan_memory(usable_together(free, max(sizes.block_bytes.values())), sizes, wish)

    if count is not None:
        return plan(min(count, source.num_blocks)), weights.use
    plans = ((blocks, plan(blocks)) for blocks in range(source.num_blocks, 0, -1))
    return next(replace(made, num_blocks=blocks) for blocks, made in plans if made.num_blocks >= blocks), weights.use


def _weights(
    layers: nn.ModuleList, source: ModelSource, dtype: torch.dtype, device: torch.device, quantization: str
) -> _Weights:
    kinds = {"none": None} | {scheme.name: scheme for scheme in schemes_on(device)}
    sizes = {name: [quantized_bytes(block, kind) for block in layers] for name, kind in kinds.items()}
    use: dict[str, Use] = {}
    if source.quantization is not None and source.quantization.formats:
        packed = list(zip(layers, packed_blocks(source), strict=True))
        kernels, all_kept = Keep(dtype, slow=False), Keep(dtype, slow=True)
        for block, weights in packed:
            use |= all_kept.uses(block, weights, device)
        if Use.KERNEL in use.values() or Use.SLOW in use.values():  # else nothing would be packed
            sizes["packed"] = [all_kept.size(block, weights, device) for block, weights in packed]
        if Use.KERNEL in use.values() and Use.SLOW in use.values():
            sizes["kernels"] = [kernels.size(block, weights, device) for block, weights in packed]
    if "packed" not in sizes and quantization == "packed":
        raise UsageError("--quantization packed: no weights of this checkpoint can stay packed here; leave it out")
    fastest = "none" if Use.KERNEL not in use.values() else "kernels" if "kernels" in sizes else "packed"
    return _Weights(sizes, fastest, use)


def place_blocks(devices: Sequence[torch.device], plan: Plan, num_blocks: int) -> list[torch.device]:
    """The device of each of the blocks, of which there are at most as many as planned."""
    shares = share_blocks(num_blocks, [free_memory(device) for device in devices], plan.bytes_each)
    return [device for device, share in zip(devices, shares, strict=True) for _ in range(share)]
