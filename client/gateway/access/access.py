"""Who may use a gateway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .key_desk import KeyDesk

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Access:
    """What :class:`swarm.client.gateway.access.guard.Guard` checks.

    Attributes:
        keys: None if no keys are asked for.
        hosts: names by which the gateway may be asked for; None for any.
        cors_origins: web origins whose pages may use it, besides its own.
    """

    keys: KeyDesk | None = None
    hosts: frozenset[str] | None = None
    cors_origins: Sequence[str] = ()
