"""Giving the blocks of a span their weights, one after the other, while those that have theirs run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from torch import nn

from swarm.compute.threads import in_thread
from swarm.errors import ModelError
from swarm.model.loading import SpanLoader
from swarm.model.span import Span
from swarm.model.tensors import fetch_span
from swarm.ranges import as_ranges

from ...engine.adapters import put_adapters
from ...engine.blocks.finish import finish_block
from ...engine.deterministic import check, make_deterministic
from ..means import Means
from ..placement.blocks import order_of_need
from .sharing import Sharing

logger = logging.getLogger(__name__)
_RETRY_SECONDS = 5.0


class Loading:
    """Loads the blocks ``start:end``, each as soon as its weights are here. What is loaded is always one run of blocks.

    Nothing but what is loaded may be run: other blocks have no memory.

    Args:
        covered: each block's throughput by others, for the order in which weights from peers are got.
    """

    def __init__(self, means: Means, start: int, end: int, covered: Sequence[float]) -> None:
        self._means, self._start, self._end, self._covered = means, start, end, covered
        self._order = list(range(start, end))
        self._loaded = 0  # of the order
        self._fetching: asyncio.Future[None] | None = None

    @property
    def ready(self) -> tuple[int, int]:
        """The run of blocks that is loaded, as ``(start, end)``; there must be one."""
        loaded = self._order[: self._loaded]
        return min(loaded), max(loaded) + 1

    @property
    def done(self) -> bool:
        """Whether all are loaded."""
        return self._loaded == len(self._order)

    @property
    def span(self) -> Span:
        """All blocks, those too that are not loaded yet. Not before :meth:`begin`."""
        return self._loader.span

    async def begin(self) -> None:
        """Gets the weights from the Hub, or begins to get them from peers.

        Raises:
            ModelError: the weights can't be had, or the architecture can't be served.
        """
        means = self._means
        if means.source.hub is not None:
            await _download(means, self._start, self._end)
        if means.sharing is not None:
            here = {block for block in self._order if means.sharing.has_block(block)}
            self._order = order_of_need(self._start, self._end, here, self._covered)
            self._fetching = asyncio.ensure_future(self._fetch(means.sharing))
        self._loader = await in_thread(self._make_loader)

    async def load_next(self) -> None:
        """Loads the next block of the order as soon as it is here, and those that follow it and are here too.

        Raises:
            ModelError, UsageError: the weights can't be had or used.
        """
        coming = self._order[self._loaded :]
        if self._means.sharing is not None and self._fetching is not None:
            coming = await self._arrived(self._means.sharing, self._fetching, coming)
        for first, last in as_ranges(sorted(coming)):
            await self._load(first, last)
        self._loaded += len(coming)

    async def close(self) -> None:
        """Closes the checkpoint, after the last block."""
        await in_thread(self._loader.close)

    async def give_up(self) -> None:
        """Stops to get weights."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    def _make_loader(self) -> SpanLoader:
        means = self._means

        def finish(block: nn.Module) -> None:
            finish_block(block, means.scheme, deterministic=means.settings.deterministic)

        return SpanLoader(
            means.source,
            self._start,
            self._end,
            dtype=means.dtype,
            device=means.devices,
            finish=finish,
            keeper=means.keep,
        )

    async def _fetch(self, sharing: Sharing) -> None:
        while True:
            try:
                return await sharing.fetch(self._order)
            except ModelError as error:
                if not self._loaded:
                    raise
                logger.warning("%s. Goes on serving what is here, and tries again", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _arrived(self, sharing: Sharing, fetching: asyncio.Future[None], coming: list[int]) -> list[int]:
        """Waits for the first of ``coming``; returns it, and those behind it that are here too."""

        async def wait() -> None:
            # of models whose blocks belong together, none is of use before all are there
            for block in coming if self._means.source.inner_boundaries else coming[:1]:
                await sharing.wait_for(block)

        arriving = asyncio.ensure_future(wait())
        try:
            await asyncio.wait({arriving, fetching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arriving.cancel()
        if fetching.done():
            fetching.result()
        missing = [number for number, block in enumerate(coming) if not sharing.has_block(block)]
        return coming[: missing[0]] if missing else coming

    async def _load(self, first: int, last: int) -> None:
        means, names = self._means, self._means.adapter_names
        with means.output.stage("load", f"Loading blocks {first}:{last}") as report:
            for block in range(first, last):
                report(block - first, last - first)
                await in_thread(partial(self._loader.load, block))
            report(last - first, last - first)
        part = self.span.part(first, last)
        if names:
            with means.output.stage("adapters", f"Loading adapters {', '.join(names)}"):
                await in_thread(lambda: put_adapters(part, means.adapters))
        if means.settings.deterministic:
            with means.output.stage("deterministic", "Making sure that results don't depend on the batch"):
                await in_thread(lambda: _make_deterministic(part, names))


async def fetch_weights(means: Means, start: int, end: int) -> None:
    """Gets the weights of the blocks ``start:end`` without loading them.

    Raises:
        ModelError: they can't be had.
    """
    if means.source.hub is not None:
        await _download(means, start, end)
    elif means.sharing is not None:
        await means.sharing.fetch(range(start, end))


async def _download(means: Means, start: int, end: int) -> None:
    with means.output.stage("download", f"Downloading blocks {start}:{end}") as fetched:
        await in_thread(lambda: fetch_span(means.source, start, end, progress=lambda *done: fetched(*done)))


def _make_deterministic(span: Span, adapters: Sequence[str]) -> None:
    for block in span.blocks:
        make_deterministic(block)
    check(span, adapters)
