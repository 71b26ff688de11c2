"""Texts without end, through the Python client and the gateway, each compared with the whole model's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch

PROMPTS = ("This method returns", "A list of the", "Raises an error if", "The first argument")
TOKENS = 48
STUCK_SECONDS = 300.0
"""A session that has got no token for so long is given up."""
_HTTP = httpx.Client(timeout=STUCK_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))
"""One for all: each makes a TLS context, whose memory would look like a leak."""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS}


@dataclass
class Tally:
    """What sessions have seen. ``gaps``: begin and end of each wait for a token, of all sessions, if they are kept."""

    done: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    keep_gaps: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def gap(self, since: float) -> float:
        """Notes a token; the time now."""
        now = time.monotonic()
        with self._lock:
            self.tokens += 1
            if self.keep_gaps:
                self.gaps.append((since, now))
        return now

    def end(self, text: object, expected: object) -> None:
        """Notes a text."""
        with self._lock:
            self.done += 1
            if text != expected:
                self.wrong.append(f"{text!r} instead of {expected!r}")

    def fail(self, error: Exception) -> None:
        """Notes an error that a caller has got."""
        with self._lock:
            self.failed.append(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Text:
    """A prompt, and how transformers continues it with the whole model."""

    prompt: str
    ids: torch.Tensor
    continued: torch.Tensor
    said: str


def of_the_whole_model() -> list[Text]:
    """For each prompt, what the whole model in one process makes of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.model.source import resolve

    path = resolve("demo").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    whole = AutoModelForCausalLM.from_pretrained(path)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        continued = whole.generate(ids, **GREEDY)[0, ids.shape[1] :]
        texts.append(Text(prompt, ids, continued, tokenizer.decode(continued, skip_special_tokens=True)))
    return texts


def by_client(model: Any, text: Text, tally: Tally) -> None:
    """One text through the Python client."""
    since = time.monotonic()

    def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal since
        since = tally.gap(since)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    made = model.generate(text.ids, stopping_criteria=[note], **GREEDY)[0, text.ids.shape[1] :]
    tally.end(made.tolist(), text.continued.tolist())


def by_gateway(url: str, text: Text, tally: Tally) -> None:
    """One text through the gateway.

    Raises:
        RuntimeError: the gateway has answered with an error.
    """
    body = {"model": "demo", "prompt": text.prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    since, said = time.monotonic(), ""
    with _HTTP.stream("POST", f"{url}/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"the gateway answers {reply.status_code}: {reply.read().decode()[:300]}")
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                since = tally.gap(since)
                said += event["choices"][0]["text"] if event["choices"] else ""
    tally.end(said, text.said)


class Sessions:
    """Threads that have ``ways`` make texts, one after another, until they are told to stop."""

    def __init__(self, ways: list[Callable[[Text, Tally], None]], texts: list[Text], tally: Tally) -> None:
        self._texts, self._tally = texts, tally
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(number, way), daemon=True) for number, way in enumerate(ways)
        ]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = STUCK_SECONDS) -> int:
        """Waits for the texts under way; how many sessions are stuck in one after ``timeout`` seconds."""
        self._over.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _go_on(self, turn: int, way: Callable[[Text, Tally], None]) -> None:
        while not self._over.is_set():
            try:
                way(self._texts[turn % len(self._texts)], self._tally)
            except Exception as error:
                self._tally.fail(error)
                print(f"FAILED: {self._tally.failed[-1]}", flush=True)
                self._over.wait(1.0)
            turn += 1
