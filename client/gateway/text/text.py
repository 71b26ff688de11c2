"""Text from tokens as they come, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


class Detokenizer:
    """Tokens to text, a piece at a time. The pieces together are what decoding all tokens at once gives.

    Some decoders look at a token's neighbours (spaces, characters of several tokens), so each piece is the difference
    that new tokens make to the text of the few before them.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens: list[int] = []
        self._context = 0  # decoding begins here
        self._done = 0  # tokens whose text has been given

    def push(self, token: int) -> str:
        """The text that ``token`` adds; empty while a character is unfinished."""
        self._tokens.append(token)
        before = self._decode(self._context, self._done)
        after = self._decode(self._context, len(self._tokens))
        if after.endswith(_UNFINISHED) or len(after) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left at the end: a character that stayed unfinished."""
        before = self._decode(self._context, self._done)
        return self._decode(self._context, len(self._tokens))[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


@dataclass(frozen=True)
class Echo:
    """A prompt as text. ``offsets``: where in it each token begins."""

    text: str = ""
    offsets: tuple[int, ...] = ()


NO_ECHO = Echo()


def spell(tokenizer: Any, tokens: Sequence[int]) -> Echo:
    """The text of ``tokens``, without special ones."""
    detokenizer, pieces, offsets, length = Detokenizer(tokenizer), [], [], 0
    for token in tokens:
        offsets.append(length)
        pieces.append(detokenizer.push(token))
        length += len(pieces[-1])
    return Echo("".join(pieces) + detokenizer.finish(), tuple(offsets))


@dataclass(frozen=True)
class Piece:
    """Text that may be shown, and whether a stop string came right after it."""

    text: str
    stopped: bool = False


class StopStrings:
    """Ends a text before the first of some strings, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> Piece:
        """What may be shown now that ``text`` has come."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return Piece(shown, stopped=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(shown)

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with, short of the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
