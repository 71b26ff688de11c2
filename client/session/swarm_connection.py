"""A client's connection to the swarm that serves one model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from swarm.errors import InputError, UsageError
from swarm.model.fingerprint import fingerprint
from swarm.model.model_source import ModelSource
from swarm.network.forks import is_forked
from swarm.network.overview import Overview, look, measure
from swarm.network.peer import Peer

from ..checks import check_hidden
from ..routing.swarm_view import SwarmView
from ..runtime import Runtime
from ..settings import ClientSettings
from . import parallel
from .divided import DividedSession
from .route_session import RouteSession
from .session import Session


class SwarmConnection:
    """Opened with :meth:`open`, shared by all sessions of a model, safe to use from several threads.

    Attributes:
        active_adapter: the LoRA adapter that is meant where none is named. Nothing here looks at it.
    """

    def __init__(
        self,
        runtime: Runtime,
        initial_peers: tuple[str, ...],
        view: SwarmView,
        source: ModelSource,
        settings: ClientSettings,
    ) -> None:
        self._runtime, self._initial_peers, self._view = runtime, initial_peers, view
        self._source, self._settings = source, settings
        self.num_blocks, self.files = source.num_blocks, source.path
        self.active_adapter = settings.active_adapter
        self._salt = None if source.keeps_states else settings.salt()
        self._closed = False

    @property
    def peer(self) -> Peer:
        """This process in the swarm."""
        return self._view.peer

    @classmethod
    def open(
        cls, source: ModelSource, initial_peers: Sequence[str], settings: ClientSettings | None = None
    ) -> SwarmConnection:
        """Joins the swarm and looks at who serves ``source``.

        Raises:
            UsageError: no initial peers given, an address is malformed, or another model is served under the name.
            ConnectError: none of the initial peers answers.
        """
        peers = tuple(initial_peers)
        if not peers:
            raise UsageError("say which swarm: initial_peers=['/ip4/…/tcp/…/p2p/…'], as printed by swarm-node serve")
        settings = settings or ClientSettings()
        runtime = Runtime.get()

        async def join() -> SwarmView:
            peer = await runtime.join(peers, startup_timeout=settings.startup_timeout)
            view = SwarmView(
                peer,
                source.dht_prefix,
                source.num_blocks,
                fingerprint(source.config),
                settings,
                inner_boundaries=source.inner_boundaries,
            )
            try:
                await view.start()
            except BaseException:
                await runtime.leave(peers)
                raise
            return view

        return cls(runtime, peers, runtime.run(join()), source, settings)

    def session(
        self, *, max_length: int, first: int = 0, last: int | None = None, adapter: str | None = None
    ) -> Session:
        """A session over the blocks ``first:last`` for up to ``max_length`` columns, with a LoRA adapter or none. Its
        first step opens the route, or several if it has more rows than nodes take in one session.

        Raises:
            UsageError: the model was not made for so many positions.
        """
        end = self.num_blocks if last is None else last
        make = partial(self.route_session, max_length=max_length, first=first, last=end, adapter=adapter)
        self._check_length(max_length)
        divided = DividedSession(make, lambda: self._view.limits(first, end).rows_of(1), self._source.hidden_size)
        return Session(self._runtime, divided, max_length, shares=self._salt is not None)

    def route_session(
        self, *, max_length: int, first: int = 0, last: int | None = None, adapter: str | None = None
    ) -> RouteSession:
        """The asynchronous side of :meth:`session`, for work in the runtime's event loop.

        Raises:
            UsageError: the model was not made for so many positions.
        """
        self._check_length(max_length)
        end = self.num_blocks if last is None else last
        return RouteSession(
            self._view,
            self._settings,
            first=first,
            last=end,
            max_length=max_length,
            hidden_size=self._source.hidden_size,
            salt=self._salt,
            croppable=not self._source.keeps_states,
            adapter=adapter,
        )

    def _check_length(self, max_length: int) -> None:
        positions = self._source.max_positions
        if positions is not None and max_length > positions:
            raise UsageError(
                f"{max_length} tokens are too long for {self._source.name}, which was made for {positions}: "
                "shorten the prompt or ask for fewer tokens"
            )

    def forward(self, hidden: torch.Tensor, *, first: int, last: int, adapter: str | None = None) -> torch.Tensor:
        """``hidden`` ``[B, T, H]`` after the blocks ``first:last``, computed without a cache.

        Raises:
            InputError: of another shape or dtype, not finite, or with rows that no message takes.
        """
        check_hidden(hidden, self._source.hidden_size, empty=True)
        work = parallel.forward(self._view, self._settings, hidden.detach().cpu(), first, last, adapter)
        return self._runtime.run(work).to(device=hidden.device, dtype=hidden.dtype)

    def adapters(self) -> list[str]:
        """The LoRA adapters with which the whole model is served now."""
        return self._view.adapters()

    async def overview(self, name: str, before: Overview | None) -> Overview:
        """The swarm now, its nodes asked themselves; rates are since ``before``. For the runtime's event loop."""
        seen = await look(self._view.peer, name, self._view.prefix, self.num_blocks)
        return await measure(self._view.peer, seen, before)

    def longest_session(self) -> int | None:
        """How many columns a session may have at most: what the model was made for and what the nodes hold.

        None if neither is known.
        """
        limits = [] if self._source.max_positions is None else [self._source.max_positions]
        held = self._view.cache_tokens()
        return min(limits if held is None else [*limits, held], default=None)

    def backward(
        self, hidden: torch.Tensor, grad: torch.Tensor, *, first: int, last: int, adapter: str | None = None
    ) -> torch.Tensor:
        """The gradient with respect to ``hidden``, given that of the blocks' output; both ``[B, T, H]``.

        Raises:
            InputError: as :meth:`forward`.
        """
        check_hidden(hidden, self._source.hidden_size, empty=True)
        check_hidden(grad, self._source.hidden_size, empty=True, what="gradients")
        if grad.shape != hidden.shape:
            raise InputError(f"gradients have the shape {tuple(grad.shape)}, hidden states {tuple(hidden.shape)}")
        work = parallel.backward(
            self._view, self._settings, hidden.detach().cpu(), grad.detach().cpu(), first, last, adapter
        )
        return self._runtime.run(work).to(device=hidden.device, dtype=hidden.dtype)

    def close(self) -> None:
        """Leaves the swarm. May be called twice, and in a forked process, where it does nothing."""
        if self._closed or is_forked():
            return
        self._closed = True

        async def leave() -> None:
            self._view.close()
            await self._runtime.leave(self._initial_peers)

        self._runtime.run(leave())
