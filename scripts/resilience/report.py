"""What a run of ``chaos.py`` has shown."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .faults import Fault
from .probe import Figures

GRACE_SECONDS = 2.0
"""A pause that begins so soon after a fault is still of that fault."""


@dataclass(frozen=True)
class Pauses:
    """The longest waits for a token in each fault of a kind, in seconds."""

    count: int
    median: float
    p90: float
    p99: float
    worst: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of ``ordered`` lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(longest: Sequence[float]) -> Pauses:
    """Of at least one pause."""
    ordered = sorted(longest)
    return Pauses(
        len(ordered), statistics.median(ordered), quantile(ordered, 0.9), quantile(ordered, 0.99), ordered[-1]
    )


def pauses(faults: Sequence[Fault], gaps: Sequence[tuple[float, float]]) -> dict[str, Pauses]:
    """By kind of fault, the longest wait for a token of any session that overlaps each fault or begins soon after it.

    Faults overlap each other, so a pause may count for several.
    """
    found: dict[str, list[float]] = {}
    for fault in faults:
        waits = [end - begin for begin, end in gaps if end > fault.begin and begin < fault.end + GRACE_SECONDS]
        found.setdefault(fault.kind, []).append(max(waits, default=0.0))
    return {kind: summary(longest) for kind, longest in sorted(found.items())}


def counts(faults: Sequence[Fault], kinds: Sequence[str]) -> dict[str, int]:
    """How often each kind has come."""
    came = Counter(fault.kind for fault in faults)
    return {kind: came[kind] for kind in kinds}


def kept(before: Mapping[str, Figures], after: Mapping[str, Figures]) -> list[str]:
    """What processes hold more of than before: more than a tenth and eight files, threads or tasks, or 64 MB."""
    more = []
    for name, now in after.items():
        was = before[name]
        if now.rss > 1.1 * was.rss + (64 << 20):
            more.append(f"{name}: {was.rss / 2**20:.0f} MB before, {now.rss / 2**20:.0f} MB after")
        for what in ("files", "threads", "tasks"):
            first, last = getattr(was, what), getattr(now, what)
            if last > 1.1 * first + 8:
                more.append(f"{name}: {first:.0f} {what} before, {last:.0f} after")
    return more


@dataclass
class Outcome:
    """What has come out. ``faults``: how often each kind came."""

    seconds: float
    faults: dict[str, int]
    texts: int
    tokens: int
    pauses: dict[str, Pauses]
    usual: Pauses
    wrong: list[str]
    failed: list[str]
    broken: list[str]
    repeated: list[str]
    stuck: int
    left: list[str]
    held: dict[str, tuple[Figures, Figures]]
    petals: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether everything was as it must be."""
        return not (self.wrong or self.failed or self.broken or self.stuck or self.left)

    def show(self) -> None:
        """Prints it."""
        print(f"\n{self.texts} texts, {self.tokens} tokens, {sum(self.faults.values())} faults in {self.seconds:.0f} s")
        print(
            f"{'the longest pause in each fault':32} {'faults':>6} {'median':>7} {'90 %':>7} {'99 %':>7} {'worst':>7}"
        )
        for kind, p in {**self.pauses, "every wait for a token": self.usual}.items():
            print(f"{kind:32} {p.count:6} {p.median:6.2f}s {p.p90:6.2f}s {p.p99:6.2f}s {p.worst:6.2f}s")
        missing = [kind for kind, count in self.faults.items() if not count]
        if missing:
            print(f"never came: {', '.join(missing)}")
        for name, (before, after) in self.held.items():
            print(
                f"{name:32} {before.rss / 2**20:.0f} -> {after.rss / 2**20:.0f} MB, files {before.files:.0f} -> "
                f"{after.files:.0f}, threads {before.threads:.0f} -> {after.threads:.0f}, tasks {before.tasks:.0f} -> "
                f"{after.tasks:.0f}"
            )
        if self.petals:
            print(f"beside them, a Petals client: {json.dumps(self.petals, ensure_ascii=False)}")
        for what in (*self.wrong, *self.broken, *self.left, *self.repeated):
            print(what)
        print(
            f"wrong texts {len(self.wrong)}, errors of callers {len(self.failed)}, stuck {self.stuck}, left behind "
            f"{len(self.left)}, faults that did not go as they should {len(self.broken)}, starts that had to be "
            f"repeated {len(self.repeated)}"
        )
