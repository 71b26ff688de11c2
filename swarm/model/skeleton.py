"""A model's own transformers class without memory behind it, and giving memory to the parts that are wanted.

Nodes load a span of blocks (:func:`load_span`), clients all but the blocks (:func:`load_ends`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..compat.attention import choose_attention
from ..compat.building import buffers_only, build_model, fill_buffers, tie, tied_names
from ..errors import ModelError, UsageError
from ..weights.checkpoint import Checkpoint
from ..weights.filling import load_weights, plan_weights
from ..weights.packed import Keeper, PackedWeight, PartReader, packed_weights
from .families import ATTENTION, REFUSED, Family, family_of
from .layout import carried_size, check_range, kv_sources
from .probe import PROBE, BlockCache, SharedKV, probe_block, unserved
from .source import ModelSource
from .span import Prepared, Span

__all__ = [
    "Prepared",
    "Skeleton",
    "Span",
    "SpanLoader",
    "assemble_span",
    "block_caches",
    "block_tensors",
    "build_skeleton",
    "end_tensors",
    "fetch_span",
    "load_ends",
    "load_span",
    "packed_blocks",
]

_KNOWN_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "attention",
    "mamba",
    "hybrid",
}


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the whole model, with a config of its own.
        base: the module in it that holds the list of blocks.
        layers: that list.
        layers_name: its name in ``model``, such as ``model.layers``.
    """

    model: PreTrainedModel
    base: nn.Module
    layers: nn.ModuleList
    layers_name: str

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def empty_layers(self) -> None:
        """Leave the model without its blocks."""
        setattr(self.base, self.layers_name.rpartition(".")[2], nn.ModuleList())


def build_skeleton(source: ModelSource, dtype: torch.dtype, *, attention: str | None = None) -> Skeleton:
    """The model's own class, no memory behind its parameters and buffers.

    Raises:
        ModelError: its config can't be built, or no list of decoder blocks is found in it.
    """
    config = copy.deepcopy(source.config)
    try:
        model = build_model(config, dtype, attention)
    except Exception as error:  # a class's own complaints about its config
        raise ModelError(f"can't build model {source.name!r} from its config: {error}") from error
    name = _layers_name(model, source.num_blocks)
    parent = model.get_submodule(name.rpartition(".")[0])
    layers = model.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    return Skeleton(model.eval(), parent, layers, name)


def load_span(
    source: ModelSource,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Sequence[torch.device],
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
    keeper: Keeper | None = None,
) -> Span:
    """Blocks ``start:end``, one at a time, so that little more memory is used than they need in the end.

    Args:
        progress: called with the number of blocks done and the number of blocks, from ``(0, n)`` to ``(n, n)``.

    The other arguments and what is raised are as for :class:`SpanLoader`.
    """
    loader = SpanLoader(source, start, end, dtype=dtype, device=device, finish=finish, keeper=keeper)
    loader.fetch()
    _fill_all(loader.span, loader.load, progress)
    loader.close()
    return loader.span


class SpanLoader:
    """Gives the blocks ``start:end`` their weights, in any order; those that have them may run meanwhile.

    Args:
        device: for all blocks, or one for each.
        finish: changes each block in place once it is loaded.
        keeper: of a quantized checkpoint, keeps weights as they are; without one, all are dequantized.

    Attributes:
        span: the blocks, at first without memory.

    Raises:
        UsageError: the model has no such blocks, or they can't be without others.
        ModelError: this architecture can't be served.
    """

    def __init__(
        self,
        source: ModelSource,
        start: int,
        end: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device],
        finish: Callable[[nn.Module], None] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        if not 0 <= start < end <= source.num_blocks:
            raise UsageError(f"blocks {start}:{end} are not in this model: it has blocks 0:{source.num_blocks}")
        check_range(start, end, source.inner_boundaries)
        self._skeleton = build_skeleton(source, dtype, attention="eager")
        self._checkpoint = Checkpoint.open(source)
        plan = plan_weights(self._skeleton.model, self._checkpoint)  # before unwanted blocks go: renames look at all
        self._names = {index: f"{self._skeleton.layers_name}.{index}." for index in range(start, end)}
        self._plans = {
            index: plan.only(lambda key, name=name: key.startswith(name))  # type: ignore[misc]
            for index, name in self._names.items()
        }
        self._finish, self._keeper = finish, keeper
        devices = [torch.device(device)] * (end - start) if isinstance(device, str | torch.device) else device
        self.span = empty_span(source, self._skeleton, start, dtype=dtype, devices=devices)

    def fetch(self) -> None:
        """Downloads what is missing of all blocks at once, if they come from the Hub.

        Raises:
            ModelError: a file is missing, or the Hub can't be reached.
        """
        self._checkpoint.fetch([key for part in self._plans.values() for key in part.keys()])  # noqa: SIM118

    def load(self, index: int) -> None:
        """Fills a block. One at a time.

        Raises:
            ModelError: its weights can't be loaded.
        """
        span, checkpoint, keeper = self.span, self._checkpoint, self._keeper
        plan, begin, block = self._plans[index], self._names[index], span.blocks[index - span.start]
        device = span.device_of(index)
        checkpoint.fetch(plan.keys())
        packed = packed_weights(plan, checkpoint, begin) if keeper is not None else {}
        chosen = set(keeper.choose(block, packed, device)) if keeper is not None else set()
        kept = {begin + name for name in chosen}
        rest = plan.only(lambda name: name not in kept)
        missing = load_weights(self._skeleton.model, rest, checkpoint, dtype=span.dtype, device=device)
        _require_none(checkpoint, sorted(key for key in missing - kept if key.startswith(begin)))
        if keeper is not None and chosen:
            try:
                keeper.fill(block, {name: packed[name] for name in chosen}, device, PartReader(checkpoint))
            except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:  # shapes that strangers chose
                reason = str(error).splitlines()[0]
                raise ModelError(f"can't use block {index} as it is in {checkpoint.listing}: {reason}") from error
        finish_filled(block, self._finish)

    def close(self) -> None:
        """Closes the checkpoint."""
        self._checkpoint.close()


def assemble_span(
    source: ModelSource,
    skeleton: Skeleton,
    start: int,
    *,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    fill: Callable[[int, torch.device], None],
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
) -> Span:
    """As :func:`empty_span`, with ``fill(index, device)`` to give memory and values to the parameters of a block; no
    block is filled before it is certain that all can be served. The rest is as for :func:`load_span`."""
    span = empty_span(source, skeleton, start, dtype=dtype, devices=devices)

    def load(index: int) -> None:
        fill(index, span.device_of(index))
        finish_filled(span.blocks[index - start], finish)

    _fill_all(span, load, progress)
    return span


def _fill_all(span: Span, load: Callable[[int], None], progress: Callable[[int, int], None] | None) -> None:
    count = span.end - span.start
    for done, index in enumerate(range(span.start, span.end)):
        if progress is not None:
            progress(done, count)
        load(index)
    if progress is not None:
        progress(count, count)


def finish_filled(block: nn.Module, finish: Callable[[nn.Module], None] | None) -> None:
    """Makes a block that has its weights ready to run."""
    if finish is not None:
        finish(block)
    block.requires_grad_(False).eval()


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
        _fill_buffers(model, module, devices[0], family)
    for index in wanted:
        family.adapt(skeleton.layers[index], config)
    caches = _probe(skeleton, family, wanted, kinds, dtype, devices[0])
    sources = {block: of for block, of in kv_sources(config).items() if block in wanted}
    if sources.keys() != {index for index, cache in zip(wanted, caches, strict=True) if cache.borrows}:
        raise unserved(source.model_type, "its blocks share keys and values in another way than its config says")
    for index, device in zip(wanted, devices, strict=True):
        _fill_buffers(model, skeleton.layers[index], device, family)

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


def _base_on(base: nn.Module, device: torch.device, first: torch.device) -> nn.Module:
    """``base``, whose buffers are on the device ``first``, with buffers on ``device`` and without any weights."""
    if device == first:
        return base
    twin = copy.copy(base)
    moved = buffers_only(base)
    twin._modules = {name: copy.deepcopy(child).to(device) for name, child in base.named_children() if child in moved}
    return twin


def fetch_span(
    source: ModelSource, start: int, end: int, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Download what is missing of the blocks ``start:end``. ``progress(bytes done, bytes to download)``.

    Raises:
        ModelError: a file is missing, or the Hub can't be reached.
    """
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), Checkpoint.open(source)
    plan = plan_weights(skeleton.model, checkpoint)
    wanted = tuple(f"{skeleton.layers_name}.{index}." for index in range(start, end))
    checkpoint.fetch(plan.only(lambda name: name.startswith(wanted)).keys(), progress)
    checkpoint.close()


def block_tensors(source: ModelSource) -> list[list[str]]:
    """For each block, the names in the checkpoint's files of all that it is made of."""
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), Checkpoint.open(source)
    plan = plan_weights(skeleton.model, checkpoint)
    blocks = []
    for index in range(source.num_blocks):
        begin = f"{skeleton.layers_name}.{index}."
        names = plan.only(lambda name, begin=begin: name.startswith(begin)).keys()  # type: ignore[misc]
        blocks.append([stored for name in names for stored in checkpoint.stored(name)])
    checkpoint.close()
    return blocks


def packed_blocks(source: ModelSource) -> list[dict[str, PackedWeight]]:
    """For each block, what a quantized checkpoint holds packed of it. Reads headers only."""
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), Checkpoint.open(source)
    plan = plan_weights(skeleton.model, checkpoint)
    every = range(source.num_blocks)
    blocks = [packed_weights(plan, checkpoint, f"{skeleton.layers_name}.{index}.") for index in every]
    checkpoint.close()
    return blocks


def end_tensors(source: ModelSource) -> list[str]:
    """The names in the checkpoint's files of all that :func:`load_ends` reads."""
    skeleton, checkpoint = build_skeleton(source, source.dtype), Checkpoint.open(source)
    plan = plan_weights(skeleton.model, checkpoint)
    skeleton.empty_layers()
    names = plan.only(set(skeleton.model.state_dict()).__contains__).keys()
    checkpoint.close()
    return [stored for name in names for stored in checkpoint.stored(name)]


def load_ends(source: ModelSource, *, dtype: torch.dtype | str = "checkpoint") -> PreTrainedModel:
    """The whole model's class with everything but its blocks: embeddings, final norm, head.

    The list of blocks is there, and empty. Weights are memory-mapped and, where ``dtype`` is that of the file, never
    copied. Tied weights are tied.

    Args:
        dtype: ``"checkpoint"`` for the checkpoint's own.

    Raises:
        ModelError: the weights can't be loaded.
    """
    chosen = source.dtype if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and dtype != "checkpoint":
        raise UsageError(f"dtype is a torch.dtype or 'checkpoint'; got {dtype!r}")
    skeleton = build_skeleton(source, chosen)
    model = skeleton.model
    checkpoint = Checkpoint.open(source)
    plan = plan_weights(model, checkpoint)
    skeleton.empty_layers()
    plan = plan.only(set(model.state_dict()).__contains__)
    checkpoint.fetch(plan.keys())
    device = torch.device("cpu")
    _fill_buffers(model, model, device, family_of(source.model_type))
    missing = load_weights(model, plan, checkpoint, dtype=chosen, device=device, mapped=True)
    tie(model, missing)
    _require_none(checkpoint, sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta))
    checkpoint.close()
    if model.can_generate():
        _read_generation_config(model, source)
    return model.requires_grad_(False).eval()


def _layers_name(model: PreTrainedModel, count: int) -> str:
    # The outermost: a list of experts in a block may happen to be of the same length.
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not names:
        raise unserved(model.config.model_type, f"{type(model).__name__} has no list of {count} blocks")
    return min(names, key=lambda name: name.count("."))


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


def _fill_buffers(model: PreTrainedModel, root: nn.Module, device: torch.device, family: Family) -> None:
    try:
        fill_buffers(model, root, device, lambda module, name: family.buffer(module, name, model.config))
    except ValueError as error:
        raise ModelError(str(error)) from error


def _require_none(checkpoint: Checkpoint, missing: list[str]) -> None:
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"tensor {missing[0]}{more} is missing from {checkpoint.listing}: the checkpoint is incomplete"
        )


def _read_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """The model's own defaults for ``generate()``, as ``from_pretrained`` reads them."""
    directory = source.path
    if source.hub is not None:
        source.hub.fetch("generation_config.json")
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def block_caches(source: ModelSource, dtype: torch.dtype) -> list[BlockCache]:
    """What each block keeps."""
    skeleton, family, device = build_skeleton(source, dtype, attention="eager"), family_of(source.model_type), "cpu"
    for module in buffers_only(skeleton.base):
        _fill_buffers(skeleton.model, module, torch.device(device), family)
    for block in skeleton.layers:
        family.adapt(block, skeleton.config)
    every = range(source.num_blocks)
    return _probe(skeleton, family, every, _layer_kinds(source), dtype, torch.device(device))
