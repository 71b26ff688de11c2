"""The ``generate()`` that is under way in this thread: its cache, and those that it opens beside it."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

from .cache import SwarmCache

if TYPE_CHECKING:
    from ..session.swarm_connection import SwarmConnection
    from .remote_blocks import RemoteBlocks

_CURRENT: ContextVar[Generation | None] = ContextVar("swarm_generation", default=None)


class Generation:
    """Within its ``with``, ``cache`` is at work in this thread.

    Code that ``generate()`` calls may itself call the model, and want a cache there: that of classifier-free guidance
    does so for the negative prompt. It gets one for as long as the generation lasts, with room for as many columns more
    as this one may still take.
    """

    def __init__(self, cache: SwarmCache) -> None:
        self.cache = cache
        self._beside: list[SwarmCache] = []
        self._outer = cache.generating  # by a generate() that calls another for the same cache
        self._token: Token[Generation | None] | None = None

    def __enter__(self) -> Generation:
        self._token = _CURRENT.set(self)
        self.cache.generating = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.cache.generating = self._outer
        if not self._outer:
            self.cache.needed = 0
        if self._token is not None:
            _CURRENT.reset(self._token)
        for cache in self._beside:
            cache.close()

    def open_beside(self, blocks: RemoteBlocks, columns: int) -> SwarmCache:
        """A cache for a pass of ``columns`` over ``blocks``, and one more for each token that is still to come."""
        cache = open_cache(blocks.connection, columns + self.cache.needed - self.cache.get_seq_length())
        self._beside.append(cache)
        return cache


def current_generation() -> Generation | None:
    """The innermost ``generate()`` that this code is called from, with the cache that it has asked for, if any."""
    return _CURRENT.get()


def open_cache(connection: SwarmConnection, max_length: int | None, *, remember: bool = False) -> SwarmCache:
    """A cache over all blocks of a model, with the adapter that is active now. Opens nothing yet."""
    adapter = connection.active_adapter
    return SwarmCache(
        lambda length: connection.session(max_length=length, adapter=adapter), max_length, remember=remember
    )
