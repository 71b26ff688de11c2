"""The blocking face of a session."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from swarm.errors import SessionInUseError
from swarm.network.forks import is_forked

from ..checks import sendable
from ..runtime import Runtime
from .divided import DividedSession
from .hop import Hop
from .prefix import column_digests


class Session:
    """A generation under way, with its KV cache held at every hop. Not for several threads at once.

    Attributes:
        max_length: columns that there is room for.
        together: how many rows, counted from the first, may become copies of each other, as beams of one prompt do. It
            is looked at when the session begins with more rows than nodes take in one, which are then divided.

    >>> with connection.session(max_length=64) as session:
    ...     hidden = session.step(hidden)
    """

    def __init__(self, runtime: Runtime, divided: DividedSession, max_length: int, *, shares: bool = False) -> None:
        self._runtime, self._divided = runtime, divided
        self._in_use = threading.Lock()
        self.together = 1
        self.max_length = max_length
        self._shares = shares
        self._turn = asyncio.Lock()  # a step that was interrupted here is cancelled there, which takes it a moment
        self._closed = False

    @property
    def position(self) -> int:
        """Columns done."""
        return self._divided.position

    @property
    def route(self) -> list[Hop]:
        """The hops, first to last; empty before the first step."""
        return list(self._divided.hops)

    def step(
        self,
        hidden: torch.Tensor,
        *,
        hypo_ids: torch.Tensor | None = None,
        left_padding: Sequence[int] | None = None,
        wanted: int | None = None,
    ) -> torch.Tensor:
        """Runs new columns through the session's blocks.

        Args:
            hidden: ``[B, T, H]``, any floating dtype and device.
            hypo_ids: ``[B]`` int64; first of all, row ``i`` becomes a copy of row ``hypo_ids[i]``.
            left_padding: with the first step only: how many columns each row ignores at its left.
            wanted: how many columns of the result, at its end, the caller will look at. The others may be zero: they
                need not be computed if nodes have their keys and values in the cache already. Default: all.

        Returns:
            ``[B, T, H]`` in the dtype and on the device of ``hidden``.

        Raises:
            MissingBlocksError: blocks were missing for longer than the client waits.
            OutOfCacheError: no node has room.
            InputError: ``hidden`` has another shape, or is not finite. The session can be used on.
            SessionInUseError: another thread is using the session.
            ValueError: longer than ``max_length``.

        After any of them, and after an interrupt (Ctrl-C), the session is as if the step had not been asked for.
        """
        if self._closed:
            raise ValueError("the session is closed")
        self._divided.check(hidden, hypo_ids)
        if self.position + hidden.shape[1] > self.max_length:
            raise ValueError(
                f"the session holds {self.max_length} tokens; it has {self.position} and gets {hidden.shape[1]} more: "
                "open it with a larger max_length"
            )
        cpu = hidden.detach().cpu() if hidden.requires_grad or not hidden.is_cpu else hidden
        cpu = sendable(cpu)
        reorder = None if hypo_ids is None else hypo_ids.detach().cpu()
        digests = column_digests(cpu) if self._shares else None  # here, and not in the loop that all sessions share
        with self._used():
            start = self.position
            step = self._step(cpu, reorder, left_padding, wanted=wanted, digests=digests, together=self.together)
            try:
                output = self._runtime.run(step)
            except BaseException:
                self._runtime.run(self._take_back(start))
                raise
        if output.dtype == hidden.dtype and hidden.is_cpu:
            return output
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def crop(self, position: int) -> None:
        """Forgets the columns from ``position`` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"can't crop to {position}: the session has {self.position} columns")

        async def crop() -> None:
            async with self._turn:
                self._divided.crop(position)

        with self._used():
            self._runtime.run(crop())

    async def _step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        async with self._turn:
            return await self._divided.step(*args, **kwargs)

    async def _take_back(self, start: int) -> None:
        async with self._turn:
            self._divided.take_back(start)  # if it was done before it heard that nobody waits

    def close(self) -> None:
        """Ends the session and frees its KV cache at every hop. May be called twice."""
        if not self._closed and not is_forked():
            self._closed = True
            self._runtime.run(self._divided.close())

    @contextmanager
    def _used(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise SessionInUseError("the session is in use by another thread: open one for each thread")
        try:
            yield
        finally:
            self._in_use.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not is_forked():
            self._runtime.start(self._divided.close())
