"""Several files at a time, with one count of bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from ...errors import ModelError
from .one_file import NoSuchFileError
from .remote_file import HubFile

T = TypeVar("T")

AT_A_TIME = 4
"""Connections. One is often slower than the line."""


def download(files: Sequence[tuple[HubFile, Sequence[str]]], progress: Callable[[int, int], None]) -> None:
    """Get the tensors named with each file. ``progress(bytes done, bytes to download)``, from one thread at a time.

    Raises:
        ModelError: the first thing that went wrong; what was under way is left to be continued.
    """
    stop, lock, done = threading.Event(), threading.Lock(), 0
    plans = _in_threads(files, lambda file, names: _known(file, lambda: file.plan(names)), stop)
    total = sum(plan.bytes for plan in plans)
    progress(0, total)

    def report(count: int) -> None:
        nonlocal done
        with lock:
            done = min(done + count, total)
            progress(done, total)

    _in_threads(
        [each for each, plan in zip(files, plans, strict=True) if plan.bytes],
        lambda file, names: _known(file, lambda: file.download(names, report, stop.is_set)),
        stop,
    )
    progress(total, total)


def _known(file: HubFile, work: Callable[[], T]) -> T:
    try:
        return work()
    except NoSuchFileError:
        raise ModelError(f"{file.name} is missing from the Hub, though the index lists it") from None


def _in_threads(
    items: Sequence[tuple[HubFile, Sequence[str]]],
    work: Callable[[HubFile, Sequence[str]], T],
    stop: threading.Event,
) -> list[T]:
    """``work`` for all, in daemon threads: an executor's would keep a process that is told to end from ending."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    todo: SimpleQueue[int] = SimpleQueue()
    for number in range(len(items)):
        todo.put(number)

    def run() -> None:
        try:
            while not stop.is_set():
                number = todo.get_nowait()
                results[number] = work(*items[number])
        except Empty:
            pass
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(AT_A_TIME, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]
