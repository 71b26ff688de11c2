"""Giving the blocks of a span their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import ModelError, UsageError
from ..weights.filling import load_weights, plan_weights, require_none
from ..weights.packed import Keeper, PartReader, packed_weights
from .empty_span import empty_span
from .layout import check_range
from .model_source import ModelSource
from .open_checkpoint import open_checkpoint
from .skeleton import Skeleton, build_skeleton
from .span import Span


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
        self._checkpoint = open_checkpoint(source)
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
        require_none(checkpoint, sorted(key for key in missing - kept if key.startswith(begin)))
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
