"""The KV cache as transformers sees it. The keys and values are on the nodes; here is the session that leads to them.

What the family's own code hands down to its layers as a cache is one of two things of ours: a
:class:`SwarmCache`, whose tokens continue those before, or a :class:`SinglePass`, which keeps nothing. Both have
``run(hidden)``, which is all that the one layer of a client's model calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swarm.compat.caches import HollowCache

from .padding import left_padding_for_cache, shift_rows

if TYPE_CHECKING:
    from ..session.hop import Hop
    from ..session.session import Session
    from .remote_blocks import RemoteBlocks


class SinglePass(HollowCache):
    """One pass through all blocks that leaves nothing behind: a plain ``model(input_ids)``."""

    def __init__(self, blocks: RemoteBlocks, left_padding: tuple[int, ...]) -> None:
        super().__init__()
        self._blocks = blocks
        self._left_padding = left_padding

    def run(self, hidden: Tensor) -> Tensor:
        """``[rows, tokens, hidden size]`` in and out, differentiable."""
        ahead = shift_rows(hidden, self._left_padding)
        return shift_rows(self._blocks(ahead), tuple(-offset for offset in self._left_padding))


class SwarmCache(HollowCache):
    """A transformers cache whose content is on the nodes of a session. ``generate()`` makes and closes its own.

    The session is opened by the first step, so that an error before it leaves nothing behind on a node.

    Args:
        open_session: makes the session, given the greatest number of columns that it will hold.
        max_length: that number, or None where ``generate()`` is still to find it out.
        remember: keep the token ids of all columns, so that :meth:`resume` can tell what is reusable.

    Attributes:
        beams: rows of each prompt; reorderings move none of them among those of another.

    Example::

        with model.session(max_length=100) as session:
            out = model(input_ids, past_key_values=session.cache)
            out = model(next_ids, past_key_values=session.cache)
    """

    def __init__(
        self, open_session: Callable[[int], Session], max_length: int | None = None, *, remember: bool = False
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.left_padding: tuple[int, ...] | None = None
        self.only_new_ids = False
        self.beams = 1
        self._open_session = open_session
        self._session: Session | None = None
        self._last_route: list[Hop] = []
        self._closed = False
        self.generating = False  # a generate() is at work in it,
        self.needed = 0  # and so many columns there will be in the end, at most
        self._fixed = max_length is not None
        self._prepared = 0
        self._hypo_ids: Tensor | None = None
        self._wanted: int | None = None
        self._known: list[Tensor] | None = [] if remember else None
        self._coming: Tensor | None = None

    # What generate() tells, before the passes of which it knows.

    def need(self, columns: int) -> None:
        """There will be ``columns`` in all, at most.

        Raises:
            ValueError: the session has less room.
        """
        if not self._fixed:
            self.max_length = columns
        elif self.max_length is not None and columns > self.max_length:
            raise ValueError(
                f"this may need {columns} positions, and the session has room for {self.max_length}: "
                "generate fewer tokens, or open the session with a greater max_length"
            )
        self.needed = columns

    def prepare(self, columns: int) -> None:
        """The next pass is of ``columns``, and what is beyond that was put in on the way to the model, as by PEFT."""
        self._prepared = columns

    # What the model calls, in this order, for every pass.

    def want(self, columns: int | None) -> None:
        """Of the pass that is about to come only the last ``columns`` will be looked at; None: all of them."""
        self._wanted = columns

    def begin(self, rows: int, columns: int, mask: Tensor | None, ids: Tensor | None) -> None:
        """Check a pass that is about to come, before anything is computed for it.

        Args:
            rows, columns: its shape.
            mask: ``[rows, columns so far + columns]``, or None for no padding.
            ids: ``[rows, columns]``, or None where the input is embeddings.

        Raises:
            ValueError: the cache is closed or full, has other rows, or the mask has zeros elsewhere than in front.
        """
        if self._closed:
            raise ValueError("this session is closed: open another with model.session(max_length=…)")
        position, prepared, self._prepared = self.get_seq_length(), self._prepared, 0
        if self.generating and 0 < prepared < columns:
            self.need(self.needed + columns - prepared)
        if self.max_length is not None and position + columns > self.max_length:
            raise ValueError(
                f"no room for {columns} more positions: {position} of {self.max_length} are taken. "
                "Open the session with a greater max_length"
            )
        if self.left_padding is None:
            self.left_padding = left_padding_for_cache(mask, rows, position + columns)
        elif len(self.left_padding) != rows:
            raise ValueError(f"this session has {len(self.left_padding)} rows; it can't go on with {rows}")
        elif mask is not None:
            # The zeros in front were checked when they came, so counting is enough and costs little per token.
            zeros = mask.shape[0] * (position + columns) - int(mask.sum())
            if mask.shape[-1] != position + columns or zeros != sum(self.left_padding):
                left_padding_for_cache(mask, rows, position + columns)  # the usual mistakes have their own text
                raise ValueError("attention_mask has other padding than when this session began")
        if self._known is not None:
            self._coming = torch.full((rows, columns), -1) if ids is None else ids.detach().cpu()

    def run(self, hidden: Tensor) -> Tensor:
        """The new columns through all blocks: ``[rows, tokens, hidden size]`` in and out."""
        session = self._session
        padding = None
        if session is None:
            session = self._session = self._open_session(self.max_length or hidden.shape[1])
            if self._closed:  # by another thread, while it was being opened
                self._end_session()
                raise ValueError("this session was closed")
            session.together = self.beams
            padding = self.left_padding if self.left_padding and any(self.left_padding) else None
        wanted, self._wanted = self._wanted, None
        hypo_ids, self._hypo_ids = self._hypo_ids, None
        try:
            result = session.step(hidden.detach().cpu(), hypo_ids=hypo_ids, left_padding=padding, wanted=wanted)
        except BaseException:  # the session is as before the step, and the caller may go on
            if session.position:
                self._hypo_ids = hypo_ids
            else:
                self.reset()
            raise
        if self._known is not None and self._coming is not None:
            self._known.append(self._coming)
        return result.to(device=hidden.device, dtype=hidden.dtype)

    # What transformers calls.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns done, padding included."""
        return 0 if self._session is None else self._session.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    @property
    def max_cache_len(self) -> int:
        """For PEFT, which asks before it makes keys and values of its own.

        Raises:
            AttributeError: always, so that ``hasattr`` says no.
        """
        raise AttributeError("keys and values can't be put into a session, as prefix tuning does: tune a prompt")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """From the next step on row ``i`` continues what was row ``beam_idx[i]``. ``beam_idx``: ``[rows]``."""
        order = beam_idx.detach().to(device="cpu", dtype=torch.int64)
        if torch.equal(order, torch.arange(len(order))):
            return
        self._hypo_ids = order if self._hypo_ids is None else self._hypo_ids[order]
        if self.left_padding is not None:
            self.left_padding = tuple(self.left_padding[row] for row in order.tolist())
        if self._known:
            self._known = [torch.cat(self._known, dim=1)[order]]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget columns at the end: ``-n`` the last ``n``, 0 none. A positive number, with which older versions of
        transformers call this, is the position from which on to forget."""
        tokens_to_remove, position = int(tokens_to_remove), self.get_seq_length()  # some versions give a tensor
        self.crop_to(position + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, position))

    def reset(self) -> None:
        """Forget everything; the next pass opens another session and may have other rows."""
        self._end_session()
        self.left_padding = None
        self._hypo_ids = self._wanted = self._coming = None
        if self._known is not None:
            self._known = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to do while the cache is empty.

        Raises:
            ValueError: it isn't: a session can't change its number of rows.
        """
        self._refuse_other_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        """As :meth:`batch_repeat_interleave`."""
        self._refuse_other_rows()

    # What the session's owner calls.

    @property
    def session(self) -> Session | None:
        """The session, once the first step has opened it."""
        return self._session

    @property
    def route(self) -> list[Hop]:
        """The hops of the present session, or of the one that was closed last."""
        return list(self._session.route) if self._session is not None else self._last_route

    def crop_to(self, position: int) -> None:
        """Forget columns from ``position`` on.

        Raises:
            ValueError: less than that has been done.
        """
        done = self.get_seq_length()
        if not 0 <= position <= done:
            raise ValueError(f"can't crop to {position}: {done} columns are done")
        if position == 0:
            self.reset()
        elif position < done and self._session is not None:
            self._session.crop(position)
            if self._known is not None:
                self._known = [torch.cat(self._known, dim=1)[:, :position]] if self._known else []

    def resume(self, ids: Tensor, mask: Tensor | None) -> int:
        """Keep only what ``ids`` begins with, and always leave at least its last column to compute.

        Args:
            ids: ``[rows or a divisor of rows, columns]``: each row stands for ``rows / len(ids)`` neighbours.
            mask: of the same shape, or None.

        Returns:
            The number of columns kept. What is left out is what a reader of ``ids`` alone would not have computed,
            so results never depend on what the session did before.
        """
        if self._session is None:
            self.reset()
            return 0
        self._wanted = None
        known = torch.cat(self._known, dim=1) if self._known else torch.empty(0, 0, dtype=torch.int64)
        rows, columns = known.shape
        if columns != self.get_seq_length() or rows == 0 or rows % len(ids):
            self.reset()
            return 0
        ids = ids.detach().cpu().repeat_interleave(rows // len(ids), dim=0)
        if mask is not None:
            padding = left_padding_for_cache(mask, len(mask), mask.shape[1])
            repeats = rows // len(mask)
            if tuple(count for count in padding for _ in range(repeats)) != self.left_padding:
                self.reset()
                return 0
        width = min(columns, ids.shape[1] - 1)
        same = (known[:, :width] == ids[:, :width]).all(dim=0)
        kept = width if bool(same.all()) else int(same.int().argmin())
        self.crop_to(kept)
        return kept

    def close(self) -> None:
        """Free the nodes' memory. May be called twice, and from another thread than the one that generates."""
        self._closed = True
        self._end_session()

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._last_route = list(session.route)
            session.close()

    def _refuse_other_rows(self) -> None:
        if self.get_seq_length():
            raise ValueError("a session can't change its number of rows once it has begun; open another")

    def __deepcopy__(self, memo: dict[int, Any]) -> SwarmCache:
        raise TypeError("a session lives on the nodes and can't be copied")
