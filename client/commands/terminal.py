"""Generating text in a terminal: what ``swarm generate`` and ``swarm chat`` share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..model.facade import SwarmModelForCausalLM
from ..session.hop import Hop


@dataclass(frozen=True)
class Generated:
    """What a generation gave.

    Attributes:
        ids: ``[1, tokens]`` int64, prompt and continuation.
        new_tokens: length of the continuation.
        first_seconds: until the first token.
        seconds: in all.
        route: the hops that computed it.
    """

    ids: torch.Tensor
    text: str
    new_tokens: int
    first_seconds: float
    seconds: float
    route: tuple[Hop, ...]

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first one, over the time that they took."""
        if self.new_tokens < 2:
            return self.new_tokens / self.seconds
        return (self.new_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)

    def describe(self) -> str:
        """One line: speed and route."""
        return describe_speed(self.new_tokens, self.tokens_per_second, self.first_seconds, describe_route(self.route))


def describe_speed(tokens: int, per_second: float, first_seconds: float, route: str) -> str:
    """One line: speed and route."""
    return f"{tokens} tokens, {per_second:.1f} tokens/s, first after {first_seconds:.2f} s, route {route}"


def describe_route(route: Sequence[Hop]) -> str:
    """``0:3 …AbCdEf → 3:8 …GhIjKl``."""
    return " → ".join(f"{hop.start}:{hop.end} …{hop.peer_id.to_base58()[-6:]}" for hop in route)


class _TimedStreamer(TextStreamer):
    """Hands the text on as it comes, and notes when the first token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._show = show
        self._puts = 0
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2 and self.first is None:  # the first is the prompt
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text + "\n" if stream_end else text)


def print_now(text: str) -> None:
    """Prints ``text`` as it is, at once."""
    print(text, end="", flush=True)


def generate_text(
    model: SwarmModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    *,
    show: Callable[[str], None] = print_now,
    stop: threading.Event | None = None,
    **options: Any,
) -> Generated:
    """Continues ``ids`` ``[1, tokens]`` and shows the text as it comes. ``options`` are those of ``generate()``.

    Once ``stop`` is set, it ends after the token that is under way.
    """
    streamer = _TimedStreamer(tokenizer, show)
    if stop is not None:

        def stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool)

        options["stopping_criteria"] = [*options.get("stopping_criteria", ()), stopped]
    begin = time.perf_counter()
    result = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
    assert isinstance(result, torch.Tensor)
    end = time.perf_counter()
    new = result.shape[1] - ids.shape[1]
    text = tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=True)
    first = (streamer.first or end) - begin
    return Generated(result, str(text), new, first, end - begin, tuple(model.last_route))
