"""What a session asks of its hops, and of what is known about the swarm. Tests put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

import torch
from hivemind.p2p import PeerID

from swarm.errors import SwarmError
from swarm.wire.handover import TakeOver
from swarm.wire.limits import MessageLimits

from ..routing.left_out import Needs
from ..routing.route import Leg
from .history import History
from .trace import Answered


class HopLike(Protocol):
    """What :class:`~swarm.client.session.hop.Hop` promises."""

    peer_id: PeerID
    start: int
    end: int
    name: str | None
    session_id: str
    history: History
    limits: MessageLimits
    left_padding: tuple[int, ...]
    is_petals: bool
    reused: int
    reorders: int
    cropped: bool
    restarts: int
    failed_at: float | None
    on_push_failed: Callable[[str], None] | None

    async def send(
        self,
        step_id: str,
        start: int,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None,
        next_hops: Sequence[Any],
        page_names: list[bytes] | None = None,
    ) -> None: ...
    def expect(self, step_id: str) -> None: ...
    def has_answered(self, step_id: str) -> bool: ...
    async def reply(self, step_id: str, timeout: float) -> torch.Tensor | None: ...
    def answered(self, step_id: str) -> Answered | None: ...
    def forget(self, step_id: str) -> None: ...
    def handover(self, seconds: float) -> TakeOver | None: ...
    async def let_push(self, peer_id: PeerID) -> None: ...
    async def close(self) -> None: ...
    def abandon(self) -> None: ...


class Daemon(Protocol):
    """What :class:`~swarm.network.peer.Peer` promises about the process that reaches others."""

    @property
    def restarts(self) -> int: ...
    async def check_daemon(self) -> None: ...


class View(Protocol):
    """What :class:`~swarm.client.routing.swarm_view.SwarmView` promises to whoever goes along its routes."""

    @property
    def peer(self) -> Daemon: ...
    async def route(
        self, first: int, last: int, needs: Needs, *, avoid: Container[PeerID] = ..., patience: float | None = None
    ) -> tuple[Leg, ...]: ...
    def succeeded(self, peer_id: PeerID) -> None: ...
    def failed(self, peer_id: PeerID, error: SwarmError, ago: float = 0.0) -> None: ...
    def full(self, peer_id: PeerID) -> None: ...
