"""Tokens of a ``generate()`` in another thread, one by one, in an asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable

from torch import Tensor

from swarm.compat.generation import BaseStreamer


class _Stopped(Exception):
    """Nobody reads any more: unwinds ``generate()`` from inside its streamer."""


class _Done:
    """Comes after the last token, with what ended the generation, if that was an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _LoopStreamer(BaseStreamer):
    """Hands what ``generate()`` puts, in its thread, to a queue in the reader's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.queue: asyncio.Queue[int | Tensor | _Done] = asyncio.Queue()
        self.stopped = False
        self._loop = loop
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.stopped:
            raise _Stopped
        if not self._prompt_seen:  # generate() puts the prompt first
            self._prompt_seen = True
            return
        # [batch] for a usual step, [1, tokens] for a speculative one, which is only done for one row.
        for column in value.reshape(value.shape[0], -1).unbind(1):
            self.send(int(column) if column.numel() == 1 else column.clone())

    def end(self) -> None:
        """The end is sent by whoever runs ``generate()``: it also has to send errors."""

    def send(self, item: int | Tensor | _Done) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


async def stream_tokens(generate: Callable[[BaseStreamer], object]) -> AsyncIterator[int | Tensor]:
    """Run ``generate(streamer)`` in a thread of its own and yield its tokens as they come.

    Yields:
        A token id per step for a batch of one, else an int64 tensor ``[batch]``. Not the prompt.

    Leaving early (``break``, ``aclose()``, cancellation) stops the generation at its next token, and waits for that.
    An error in ``generate`` is raised here.
    """
    streamer = _LoopStreamer(asyncio.get_running_loop())

    def work() -> None:
        error: BaseException | None = None
        try:
            generate(streamer)
        except _Stopped:
            pass
        except BaseException as raised:
            error = raised
        streamer.send(_Done(error))

    # The reader's context goes along, so that a session whose `with` is open there is the one that is used.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="swarm-stream", daemon=True).start()
    item: int | Tensor | _Done | None = None
    try:
        while not isinstance(item := await streamer.queue.get(), _Done):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        streamer.stopped = True
        while not isinstance(item, _Done):
            item = await streamer.queue.get()
