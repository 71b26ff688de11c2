"""Which tokens of a batch go through which adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterTokens:
    """The tokens ``begin:end`` of a batch go through an adapter, or through none if ``adapter`` is empty."""

    adapter: str
    begin: int
    end: int


def adapter_tokens(counts: Iterable[tuple[str, int]]) -> tuple[AdapterTokens, ...]:
    """For a batch that holds so many tokens of each adapter one after the other; empty if none has an adapter."""
    found: list[AdapterTokens] = []
    at = 0
    for adapter, group in itertools.groupby(counts, lambda pair: pair[0]):
        end = at + sum(count for _, count in group)
        found.append(AdapterTokens(adapter, at, end))
        at = end
    return tuple(found) if any(tokens.adapter for tokens in found) else ()
