"""A session as the user holds it: several ``generate()`` calls that don't compute the same tokens twice."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ends.cache import SwarmCache

if TYPE_CHECKING:
    from ..session.hop import Hop

# The sessions whose `with` is open in this thread or asyncio task, innermost last.
_OPEN: ContextVar[tuple[ModelSession, ...]] = ContextVar("swarm_open_sessions", default=())


class ModelSession:
    """Made by ``model.session(max_length=…)``. Within its ``with`` every ``model.generate`` of this thread uses it.

    Always pass the full ids: the prompt, what was generated, and what is new. The session knows which of them it has
    seen and computes only the rest; if you changed something in the middle, it goes back to there. So a session only
    saves time: the result is that of one ``generate()`` over the same ids. (If ``attention_mask`` is longer than
    the ids, namely as long as all columns so far plus them, they are taken as new ones only, as in transformers.)

    Example::

        with model.session(max_length=512) as session:
            ids = model.generate(prompt_ids, max_new_tokens=50)
            ids = torch.cat([ids, more_ids], dim=1)
            ids = model.generate(ids, max_new_tokens=50)      # computes more_ids and one token before, then goes on
            print(session.route)

    Attributes:
        model: the :class:`swarm.client.SwarmModelForCausalLM` whose session it is.
        cache: pass it as ``cache`` or ``past_key_values`` to ``model(…)`` or to ``generate`` in another thread.
        max_length: how many columns there is room for.
    """

    def __init__(self, model: Any, cache: SwarmCache, max_length: int) -> None:
        self.model = model
        self.cache = cache
        self.max_length = max_length

    @property
    def position(self) -> int:
        """Columns done. After ``generate()`` that is one less than the ids it returned: nobody has read the last."""
        return self.cache.get_seq_length()

    @property
    def route(self) -> list[Hop]:
        """The hops in use; empty before the first step."""
        return self.cache.route

    def step(self, hidden: Tensor) -> Tensor:
        """Hidden states through all blocks, after those before: ``[rows, tokens, hidden size]`` in and out.

        Raises:
            ValueError: closed or full, or the number of rows has changed.
        """
        self.cache.begin(hidden.shape[0], hidden.shape[1], None, None)
        return self.cache.run(hidden)

    def crop(self, position: int) -> None:
        """Forget columns from ``position`` on."""
        self.cache.crop_to(position)

    def close(self) -> None:
        """Free the nodes' memory. ``with`` does it by itself; twice is harmless."""
        self.cache.close()

    def __enter__(self) -> ModelSession:
        _OPEN.set((*_OPEN.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not a reset token: an async generator may leave in another context than the one it entered in.
        _OPEN.set(tuple(session for session in _OPEN.get() if session is not self))
        self.close()


def open_cache_of(model: object) -> SwarmCache | None:
    """That of the innermost session of ``model`` whose ``with`` is open here, if any."""
    return next((session.cache for session in reversed(_OPEN.get()) if session.model is model), None)
