"""``swarm chat``: a conversation in a terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from swarm.commands.terminal import require_text, text_input
from swarm.errors import SwarmError, UsageError

from .backends import Backend, Message, Reply
from .terminal import describe_speed, print_now

HELP = """\
/reset          forget the conversation
/system TEXT    what the model is to be told first; without TEXT, nothing (forgets the conversation)
/route          the nodes that computed the last reply, and how fast
/save FILE      write the conversation as JSON
/help           this
/exit           end; so does Ctrl-D
A line that ends with \\ goes on in the next; Alt-Enter also starts a new line. Ctrl-C stops a reply."""


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash: ``/save notes.json`` has the name ``save`` and the rest ``notes.json``."""

    name: str
    rest: str


def parse(text: str) -> Command | str:
    """What the user typed: a command, or a message."""
    if not text.startswith("/"):
        return text
    name, _, rest = text[1:].partition(" ")
    return Command(name.strip(), rest.strip())


def joined(read: Callable[[str], str]) -> str:
    """One message: lines that end with a backslash go on in the next.

    Raises:
        EOFError: the input has ended.
    """
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("… "))
    return "\n".join(lines)


class Talk:
    """One conversation after the other, until the user leaves."""

    def __init__(self, backend: Backend, *, max_tokens: int, system: str | None) -> None:
        self._backend, self._max_tokens = backend, max_tokens
        self._system = system
        self._messages: list[Message] = []
        self._last: Reply | None = None

    def run(self, read: Callable[[str], str]) -> None:
        """Reads messages and commands with ``read(prompt)`` until there are no more."""
        while True:
            try:
                said = parse(require_text(joined(read), "what you said"))
            except UsageError as error:
                print(f"Error: {error}", file=sys.stderr)
                continue
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:  # at the prompt: drops the line
                print(file=sys.stderr)
                continue
            if isinstance(said, Command):
                if said.name in ("exit", "quit"):
                    return
                self._obey(said)
            elif said.strip():
                self._answer(said)

    def _answer(self, text: str) -> None:
        messages = [*self._opening(), *self._messages, {"role": "user", "content": text}]
        try:
            with _stopped_by_ctrl_c() as stop:
                reply = self._backend.chat(messages, max_tokens=self._max_tokens, show=print_now, stop=stop)
        except SwarmError as error:
            print(f"Error: {error}", file=sys.stderr)
            return  # the message is dropped, and the conversation is as before
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        self._last = reply
        print(f"[{_describe(reply)}]", file=sys.stderr)

    def _obey(self, command: Command) -> None:
        if command.name == "reset":
            self._forget()
            print("Forgotten.", file=sys.stderr)
        elif command.name == "system":
            self._system = command.rest or None
            self._forget()
            print("The model is told this first." if command.rest else "The model is told nothing.", file=sys.stderr)
        elif command.name == "route":
            print("Nothing was computed yet." if self._last is None else _describe(self._last), file=sys.stderr)
        elif command.name == "save":
            self._save(command.rest)
        else:
            if command.name != "help":
                print(f"There is no /{command.name}.", file=sys.stderr)
            print(HELP, file=sys.stderr)

    def _save(self, where: str) -> None:
        if not where:
            print("Say where to: /save FILE", file=sys.stderr)
            return
        try:
            Path(where).expanduser().write_text(
                json.dumps([*self._opening(), *self._messages], indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte, a home that is nobody's
            print(f"Error: can't write {where}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return
        print(f"Saved {len(self._messages)} messages to {where}.", file=sys.stderr)

    def _forget(self) -> None:
        self._messages = []
        self._backend.forget()

    def _opening(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


def make_reader() -> Callable[[str], str]:
    """How lines are read: with editing and a history on a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        lines = text_input()

        def read_line(prompt: str) -> str:
            line = lines.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")

        return read_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "swarm"
    state.mkdir(parents=True, exist_ok=True)
    history = state / "chat_history"
    history.touch(mode=0o600)  # what people ask is nobody else's business
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)), key_bindings=keys, multiline=True, prompt_continuation="… "
    )
    return session.prompt


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    usual = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)


def _describe(reply: Reply) -> str:
    return describe_speed(reply.new_tokens, reply.tokens_per_second, reply.first_seconds, reply.route)
