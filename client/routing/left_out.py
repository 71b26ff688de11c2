"""What was seen of nodes that serve blocks and yet can't be used, and the text that says so. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.network.clock import TOLERATED_SECONDS, describe_skew
from swarm.wire.limits import limits_of
from swarm.wire.records import ServerInfo

from .route import describe_blocks

DETERMINISTIC = " deterministically (nodes say so with swarm-node serve --deterministic)"
PADDED = " to rows with padding at their left (pass rows of one length to use servers that can't)"
_SHOWN = 8  # nodes


@dataclass(frozen=True)
class Needs:
    """What a route is for.

    Attributes:
        rows, columns: of the smallest message that has to go through.
        cache_tokens: for which a session needs room.
        left_padding: rows start later, which Petals' servers can't.
        adapter: the LoRA adapter that all of it goes through.
        deterministic: only by way of nodes that say so.
    """

    rows: int = 1
    columns: int = 1
    cache_tokens: int = 0
    left_padding: bool = False
    adapter: str | None = None
    deterministic: bool = False

    def describe(self) -> str:
        """As it stands behind "nobody serves blocks 3:6 of the-model"."""
        adapter = f" with the adapter {self.adapter!r}" if self.adapter else ""
        return adapter + (PADDED if self.left_padding else "") + (DETERMINISTIC if self.deterministic else "")

    def unmet(self, info: ServerInfo) -> str | None:
        """Why a node can't be used for this, by its own record; None if it can."""
        limits = limits_of(info)
        if limits.rows_of(self.columns) < self.rows:
            return f"takes up to {limits.rows} rows, and {limits.tokens} tokens in a message"
        if self.left_padding and not (info.offer and info.offer.left_padding):
            return "takes no rows with padding at their left"
        if self.deterministic and not (info.offer and info.offer.deterministic):
            return "is not deterministic"
        if self.adapter and self.adapter not in info.adapters:
            return f"does not have the adapter {self.adapter!r}"
        return None


@dataclass(frozen=True)
class LeftOut:
    """A node that serves ``start:end``, and why it can't be used: ``why`` follows on its name."""

    peer: str
    name: str | None
    start: int
    end: int
    why: str

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"…{self.peer[-8:]}{name} ({self.start}:{self.end}) {self.why}"


@dataclass(frozen=True)
class Seen:
    """All that is known when blocks stay missing.

    Attributes:
        blocks: those that are missing.
        waited: seconds.
        left_out: nodes that serve some of them.
        skews: seconds that this machine's clock is ahead of other peers' by; empty if none of them answers; None if
            none were asked.
    """

    blocks: Sequence[int]
    model: str
    needs: Needs
    waited: float
    left_out: Sequence[LeftOut] = ()
    skews: Sequence[float] | None = None


def explain(seen: Seen) -> str:
    """Why blocks can't be had, and what to do."""
    first, last = seen.blocks[0], seen.blocks[-1] + 1
    text = f"nobody serves {describe_blocks(seen.blocks)} of {seen.model}{seen.needs.describe()}"
    adapters = " --adapters …" if seen.needs.adapter else ""
    serve = f"(swarm-node serve … --blocks {first}:{last}{adapters}) or raise wait_timeout"
    nodes = [str(node) for node in seen.left_out]
    if len(nodes) > _SHOWN:
        nodes[_SHOWN:] = [f"and {len(nodes) - _SHOWN} more"]
    if nodes:
        text += " that can be used"
    text += f", waited {seen.waited:.0f} s: "
    if seen.skews is not None and not seen.skews:
        return text + "no peer of the swarm answers; see whether this machine is online and the swarm still runs"
    skew = min(seen.skews or [0.0], key=abs)  # that of a peer which is off itself is larger
    if abs(skew) > TOLERATED_SECONDS:
        return text + f"{'; '.join([*nodes, describe_skew(skew)])}, since records seem to have expired"
    if nodes:
        return text + f"{'; '.join(nodes)}. Mend one of these, start another node {serve}"
    return text + f"start a node for them {serve}"
