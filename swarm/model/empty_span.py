"""A span of a model's blocks without memory: what each of them keeps is known before any weights are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..compat.attention import choose_attention
from ..compat.building import buffers_only, tied_names
from .families import ATTENTION, REFUSED, Family, family_of
from .layout import carried_size, kv_sources
from .model_source import ModelSource
from .probe import PROBE, BlockCache, SharedKV, probe_block, unserved
from .skeleton import Skeleton, build_skeleton, fill_buffers_of
from .span import Span

_KNOWN_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "attention",
    "mamba",
    "hybrid",
}


def empty_span(
    source: ModelSource,
    skeleton: Skeleton,
    start: int,
    *,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
) -> Span:
    """A span of the blocks from ``start`` on, as many as ``devices``, in a fresh ``skeleton`` (eager attention), which
    is used up by this. Their parameters have no memory yet.

    Raises:
        ModelError: this architecture can't be served.
    """
    wanted = range(start, start + len(devices))
    model, config, family = skeleton.model, skeleton.config, family_of(source.model_type)
    for index in range(source.num_blocks):
        if index not in wanted:
            skeleton.layers[index] = nn.Identity()
    kinds = _layer_kinds(source)[wanted.start : wanted.stop]
    for module in buffers_only(skeleton.base):  # what else is outside the blocks is the client's
        fill_buffers_of(model, module, devices[0], family)
    for index in wanted:
        family.adapt(skeleton.layers[index], config)
    caches = _probe(skeleton, family, wanted, kinds, dtype, devices[0])
    sources = {block: of for block, of in kv_sources(config).items() if block in wanted}
    if sources.keys() != {index for index, cache in zip(wanted, caches, strict=True) if cache.borrows}:
        raise unserved(source.model_type, "its blocks share keys and values in another way than its config says")
    for index, device in zip(wanted, devices, strict=True):
        fill_buffers_of(model, skeleton.layers[index], device, family)

    choose_attention(config, ATTENTION)
    return Span(
        start=wanted.start,
        end=wanted.stop,
        dtype=dtype,
        devices=tuple(devices),
        hidden_size=source.hidden_size,
        kv=tuple(cache.kv for cache in caches),
        kv_sources=sources,
        state_bytes=sum(cache.state_bytes for cache in caches),
        parameter_bytes=sum(_parameter_bytes(skeleton.layers[index]) for index in wanted),
        config=config,
        blocks=nn.ModuleList(skeleton.layers[index] for index in wanted).eval(),
        bases={device: _base_on(skeleton.base, device, devices[0]) for device in dict.fromkeys(devices)},
        family=family,
        kinds=kinds,
    )


def block_caches(source: ModelSource, dtype: torch.dtype) -> list[BlockCache]:
    """What each block keeps."""
    skeleton, family, device = build_skeleton(source, dtype, attention="eager"), family_of(source.model_type), "cpu"
    for module in buffers_only(skeleton.base):
        fill_buffers_of(skeleton.model, module, torch.device(device), family)
    for block in skeleton.layers:
        family.adapt(block, skeleton.config)
    every = range(source.num_blocks)
    return _probe(skeleton, family, every, _layer_kinds(source), dtype, torch.device(device))


def _base_on(base: nn.Module, device: torch.device, first: torch.device) -> nn.Module:
    """``base``, whose buffers are on the device ``first``, with buffers on ``device`` and without any weights."""
    if device == first:
        return base
    twin = copy.copy(base)
    moved = buffers_only(base)
    twin._modules = {name: copy.deepcopy(child).to(device) for name, child in base.named_children() if child in moved}
    return twin


def _layer_kinds(source: ModelSource) -> tuple[str, ...]:
    kinds = getattr(source.config, "layer_types", None) or ["full_attention"] * source.num_blocks
    if unknown := sorted(set(kinds) - _KNOWN_LAYER_TYPES):
        raise unserved(source.model_type, f"it has layers of type {', '.join(unknown)}")
    return tuple(kinds)


def _probe(
    skeleton: Skeleton, family: Family, wanted: range, kinds: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> list[BlockCache]:
    """What each of the blocks keeps."""
    config = skeleton.config
    if (why := REFUSED.get(config.model_type)) is not None:
        raise unserved(config.model_type, why)
    if tied := _tied_blocks(skeleton):
        raise unserved(config.model_type, f"its blocks {tied[0]} and {tied[1]} share weights, but not a node")
    choose_attention(config, PROBE)
    hidden = torch.zeros(1, 1, carried_size(config), dtype=dtype, device=device)
    positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
    embeddings = family.position_embeddings(skeleton.base, config, hidden, positions)
    hidden, positions, embeddings = tree_map_only(
        torch.Tensor, lambda tensor: tensor.to("meta"), (hidden, positions, embeddings)
    )
    shared_kv: SharedKV = {}
    return [
        probe_block(
            family,
            skeleton.layers[index],
            hidden,
            positions,
            embeddings[kind] if isinstance(embeddings, dict) else embeddings,
            kind=kind,
            model_type=config.model_type,
            shared_kv=shared_kv,
        )
        for index, kind in zip(wanted, kinds, strict=True)
    ]


def _tied_blocks(skeleton: Skeleton) -> tuple[int, int] | None:
    """Two blocks with weights in common, which are loaded for each of them alone."""
    begin = skeleton.layers_name + "."
    for pair in tied_names(skeleton.model).items():
        blocks = sorted({int(name[len(begin) :].partition(".")[0]) for name in pair if name.startswith(begin)})
        if len(blocks) > 1:
            return blocks[0], blocks[1]
    return None


def _parameter_bytes(module: nn.Module) -> int:
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
