"""The calls that are under way through a daemon, in hivemind's lists of them.

hivemind's reader of the daemon's messages sets the result of whatever future it finds in its list, also of one that has
just been cancelled. Then it ends, and with it all calls of the process, without a word. And who handles a call leaves
its task in another list if the caller gives up.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Pending(dict[Any, "asyncio.Future[Any]"]):
    """Calls that wait for an answer: one that waits no more is not there."""

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class Handled(dict[Any, "asyncio.Task[Any]"]):
    """Calls that are answered here: each is gone as soon as it is, however it ends."""

    def __setitem__(self, call: Any, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call, task)
        task.add_done_callback(lambda _: self.pop(call, None))

    def pop(self, call: Any, default: Any = None) -> Any:
        """As a dict's, and never fails."""
        return super().pop(call, default)


def mend(control: Any) -> None:
    """Gives hivemind's connection to a daemon, which has just been made, lists that can't break it or grow."""
    control._pending_calls = Pending(control._pending_calls)
    control._handler_tasks = Handled(control._handler_tasks)
    for task in (control._read_task, control._write_task):
        task.add_done_callback(look_at)


def look_at(done: asyncio.Future[Any]) -> None:
    """Takes note of how it ended: asyncio writes to the log what nobody has looked at."""
    if not done.cancelled():
        done.exception()
