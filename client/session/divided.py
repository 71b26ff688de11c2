"""A batch of more rows than nodes take in one session: several sessions that look like one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import torch

from swarm.errors import InputError
from swarm.wire.limits import divide_rows

from ..checks import check_hidden, check_hypo_ids
from .hop import Hop
from .prefix import Digests
from .route_session import RouteSession

T = TypeVar("T")


class DividedSession:
    """As :class:`RouteSession`, for any number of rows. Each part has its own route and its own place in the KV cache.

    Args:
        make: a new :class:`RouteSession`.
        most: tells how many rows one of them can have.
    """

    def __init__(self, make: Callable[[], RouteSession], most: Callable[[], int], hidden_size: int) -> None:
        self._make, self._most, self._hidden_size = make, most, hidden_size
        self._parts: list[tuple[slice, RouteSession]] = []

    @property
    def position(self) -> int:
        """Columns done."""
        return self._parts[0][1].position if self._parts else 0

    @property
    def hops(self) -> list[Hop]:
        """Those of the first part."""
        return self._parts[0][1].hops if self._parts else []

    def check(self, hidden: torch.Tensor, hypo_ids: torch.Tensor | None) -> None:
        """Raises InputError for a step that no node would take. Needs no event loop, and changes nothing."""
        check_hidden(hidden, self._hidden_size, rows=self._parts[-1][0].stop if self._parts else 0)
        check_hypo_ids(hypo_ids, len(hidden))

    async def step(
        self,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None,
        left_padding: Sequence[int] | None,
        *,
        wanted: int | None = None,
        digests: Digests | None = None,
        together: int = 1,
    ) -> torch.Tensor:
        """See :meth:`RouteSession.step`; first call :meth:`check`. ``together``, with the first step: that many rows,
        such as the beams of a prompt, may become copies of each other.

        Raises:
            InputError: a row is to become a copy of one in another part.
        """
        if not self._parts:
            self._parts = [(rows, self._make()) for rows in self._divide(len(hidden), together)]
        if len(self._parts) == 1:
            return await self._parts[0][1].step(hidden, hypo_ids, left_padding, wanted=wanted, digests=digests)
        orders = _divide_order(hypo_ids, [rows for rows, _ in self._parts])
        start = self.position
        try:
            outputs = await all_of(
                part.step(
                    hidden[rows],
                    order,
                    left_padding[rows] if left_padding else None,
                    wanted=wanted,
                    digests=digests[rows] if digests is not None else None,
                )
                for (rows, part), order in zip(self._parts, orders, strict=True)
            )
        except BaseException:
            self.take_back(start)
            raise
        return torch.cat(outputs)

    def take_back(self, start: int) -> None:
        """See :meth:`RouteSession.take_back`: of a step from ``start`` on, in the parts that have done it."""
        for _, part in self._parts:
            if part.position > start:
                part.take_back()

    def crop(self, position: int) -> None:
        """See :meth:`RouteSession.crop`."""
        for _, part in self._parts:
            part.crop(position)

    async def close(self) -> None:
        """See :meth:`RouteSession.close`."""
        await asyncio.gather(*(part.close() for _, part in self._parts))

    def _divide(self, rows: int, together: int) -> list[slice]:
        most = self._most()
        together = together if rows % together == 0 else 1
        if together > most:
            raise InputError(f"{together} rows that may become copies of each other: nodes take {most} in a session")
        return divide_rows(rows, most, together)


async def all_of(works: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, which run at the same time. If one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _divide_order(hypo_ids: torch.Tensor | None, parts: Sequence[slice]) -> list[torch.Tensor | None]:
    """What ``hypo_ids`` say to each part, in numbers of its own rows."""
    if hypo_ids is None:
        return [None] * len(parts)
    orders: list[torch.Tensor | None] = []
    for rows in parts:
        order = hypo_ids[rows] - rows.start
        if int(order.min()) < 0 or int(order.max()) >= rows.stop - rows.start:
            raise InputError(
                f"the rows {rows.start}:{rows.stop} are in a session of their own, as a batch of {parts[-1].stop} rows "
                "is too large for one, so none of them can become a copy of a row elsewhere: use a smaller batch"
            )
        orders.append(order)
    return orders
