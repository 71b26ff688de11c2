"""Which of a checkpoint's tensors make up a model's blocks, and its ends."""

from __future__ import annotations

from collections.abc import Callable

from ..weights.filling import plan_weights
from ..weights.packed import PackedWeight, packed_weights
from .model_source import ModelSource
from .open_checkpoint import open_checkpoint
from .skeleton import build_skeleton


def fetch_span(
    source: ModelSource, start: int, end: int, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Download what is missing of the blocks ``start:end``. ``progress(bytes done, bytes to download)``.

    Raises:
        ModelError: a file is missing, or the Hub can't be reached.
    """
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), open_checkpoint(source)
    plan = plan_weights(skeleton.model, checkpoint)
    wanted = tuple(f"{skeleton.layers_name}.{index}." for index in range(start, end))
    checkpoint.fetch(plan.only(lambda name: name.startswith(wanted)).keys(), progress)
    checkpoint.close()


def block_tensors(source: ModelSource) -> list[list[str]]:
    """For each block, the names in the checkpoint's files of all that it is made of."""
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), open_checkpoint(source)
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
    skeleton, checkpoint = build_skeleton(source, source.dtype, attention="eager"), open_checkpoint(source)
    plan = plan_weights(skeleton.model, checkpoint)
    every = range(source.num_blocks)
    blocks = [packed_weights(plan, checkpoint, f"{skeleton.layers_name}.{index}.") for index in every]
    checkpoint.close()
    return blocks


def end_tensors(source: ModelSource) -> list[str]:
    """The names in the checkpoint's files of all that :func:`load_ends` reads."""
    skeleton, checkpoint = build_skeleton(source, source.dtype), open_checkpoint(source)
    plan = plan_weights(skeleton.model, checkpoint)
    skeleton.empty_layers()
    names = plan.only(set(skeleton.model.state_dict()).__contains__).keys()
    checkpoint.close()
    return [stored for name in names for stored in checkpoint.stored(name)]
