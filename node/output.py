"""What a node tells whoever started it: text with progress bars and panels for people, JSON lines for scripts."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class Stage(Protocol):
    """A part of the start-up under way."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Says how much of it is done, and ``note``."""


class Output(Protocol):
    """Where a node's events go."""

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Something happened: ``text`` for people, ``name`` and ``fields`` for scripts."""

    def panel(self, name: str, title: str, lines: list[str], **fields: Any) -> None:
        """Something that people need to read and copy."""

    def error(self, text: str) -> None:
        """One line that says what to do."""

    def stage(self, name: str, text: str) -> Any:
        """A context manager for a stage with progress; gives a :class:`Stage`."""


class TextOutput:
    """For people."""

    def __init__(self) -> None:
        self._console = Console(stderr=False, highlight=False)
        handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
        self._live = False

    def event(self, name: str, text: str, **fields: Any) -> None:
        self._console.print(text, markup=False)

    def panel(self, name: str, title: str, lines: list[str], **fields: Any) -> None:
        # no side borders, no wrapping: the lines are there to be copied
        self._console.print(Panel(Text(title, style="bold green"), expand=False))
        for line in lines:
            self._console.print(line, markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        Console(stderr=True, highlight=False).print(f"Error: {text}", style="red", markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Stage]:
        if self._live:  # blocks are loaded while others still come: one bar at a time
            self._console.print(text, markup=False)
            yield lambda done, total, note="": None
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
        ]
        if name == "download":  # the one stage that counts bytes
            columns += [DownloadColumn(binary_units=True), TransferSpeedColumn(), TextColumn("{task.fields[note]}")]
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            task = progress.add_task(text, total=1.0, note="")
            self._live = True
            try:
                yield lambda done, total, note="": progress.update(task, completed=done, total=total, note=note)
            finally:
                self._live = False
            progress.update(task, completed=progress.tasks[0].total)


class JsonOutput:
    """For scripts and supervisors: every line on stdout is one JSON object with ``event`` and ``time``."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_JsonFormatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
        logging.captureWarnings(True)

    def event(self, name: str, text: str, **fields: Any) -> None:
        _print_json({"event": name, "message": text, **fields})

    def panel(self, name: str, title: str, lines: list[str], **fields: Any) -> None:
        self.event(name, title, **fields)

    def error(self, text: str) -> None:
        self.event("error", text)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Stage]:
        last = -1

        def report(done: float, total: float, note: str = "") -> None:
            nonlocal last
            tenth = int(10 * done / total) if total else 0
            if tenth > last:  # at most eleven lines a stage
                last = tenth
                self.event("progress", text, stage=name, done=done, total=total, note=note)

        report(0, 1)
        yield report


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"event": "log", "time": record.created, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _print_json(fields: dict[str, Any]) -> None:
    print(json.dumps({"time": time.time(), **fields}, default=str), flush=True)


def make_output(log_format: str) -> Output:
    """``"text"`` or ``"json"``."""
    return JsonOutput() if log_format == "json" else TextOutput()
