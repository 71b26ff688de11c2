"""Processes that are forked from one that is in a swarm.

A fork copies memory, but no threads: in the child the event loop stands still for ever, and its sockets and its daemon
are the parent's. torch's threads are not there either. So a child uses nothing of it, new models included, and says so
at once; one that is spawned, or forked before the first model was made, can do everything.
"""

from __future__ import annotations

import ctypes
import os
import weakref

from ..errors import UsageError

_connections: weakref.WeakSet[object] = weakref.WeakSet()
_forked = False


def belongs_to_process(connection: object) -> None:
    """Notes that ``connection`` is of no use in a child, nor may a child finalize its copy: that would end the parent's
    daemon, or take the parent's sockets out of an event loop that both have."""
    _connections.add(connection)


def is_forked() -> bool:
    """Whether this process is a fork of one that was in a swarm."""
    return _forked


def refuse_fork() -> None:
    """
    Raises:
        UsageError: this process is a fork of one that was in a swarm.
    """
    if _forked:
        raise UsageError(
            "this process was forked from one that has used a swarm, and connections and threads don't survive a fork: "
            "start it with spawn (multiprocessing.get_context('spawn')), or fork before the first model is made"
        )


def _mark_child() -> None:
    global _forked
    for connection in list(_connections):
        _forked = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # for good, also when the interpreter ends


os.register_at_fork(after_in_child=_mark_child)
