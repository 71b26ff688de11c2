"""The swarms on a local network, and which of them is meant."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ...errors import ConnectError, UsageError
from .record import LanRecord, is_swarm_name, model_label

DEFAULT_NAME = "default"
"""Of a swarm that nobody has given a name."""
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class LanSwarm:
    """The nodes that announce a swarm of this name."""

    name: str
    nodes: tuple[LanRecord, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """What it serves, by names in the DHT."""
        return tuple(sorted({node.model for node in self.nodes} - {""}))

    def serves(self, models: Iterable[Collection[str]]) -> bool:
        """Whether it has all of ``models``, each given by the names that it may have in the DHT."""
        known = set(self.models)
        return all(any(model_label(name) in known for name in names) for names in models)

    def __str__(self) -> str:
        nodes = "1 node" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        return f"{self.name!r} ({', '.join(self.models) or 'no model'}; {nodes})"


def swarms_of(records: Iterable[LanRecord]) -> list[LanSwarm]:
    """The records by swarm, in the order of their names."""
    found: dict[str, dict[str, LanRecord]] = {}
    for record in records:
        found.setdefault(record.swarm, {})[record.peer_id] = record
    return [LanSwarm(name, tuple(nodes[peer] for peer in sorted(nodes))) for name, nodes in sorted(found.items())]


def check_name(name: str | None) -> None:
    """Raises UsageError if a swarm can't be called so."""
    if name is not None and not is_swarm_name(name):
        raise UsageError(f"a swarm's name is a word or a few, of at most 60 bytes; got {name!r}")


def for_node(swarms: Sequence[LanSwarm], name: str | None, models: Sequence[Collection[str]]) -> str:
    """The name of the swarm that a node for ``models`` joins, or starts if there is none: the one that is asked for,
    else the only one that serves the model, else the one without a name of its own.

    Raises:
        UsageError: several have the model.
    """
    if name is not None:
        return name
    fitting = [swarm for swarm in swarms if models and swarm.serves(models)]
    if len(fitting) == 1:
        return fitting[0].name
    if not fitting or any(swarm.name == DEFAULT_NAME for swarm in fitting):
        return DEFAULT_NAME
    raise UsageError(_several("with this model", fitting))


def for_client(swarms: Sequence[LanSwarm], name: str | None, models: Sequence[Collection[str]]) -> LanSwarm:
    """The swarm that a client of ``models`` joins: the one that is asked for, else the only one that serves them, else
    the only one, which may have nodes beyond this network.

    Raises:
        ConnectError: there is none.
        UsageError: it isn't clear which is meant.
    """
    if not swarms:
        raise ConnectError(nobody_found())
    if name is not None:
        found = next((swarm for swarm in swarms if swarm.name == name), None)
        if found is None:
            raise ConnectError(f"no swarm on this network is called {name!r}; there are {', '.join(map(str, swarms))}")
        return found
    fitting = [swarm for swarm in swarms if swarm.serves(models)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and len(swarms) == 1:
        return swarms[0]
    raise UsageError(_several("with this model" if fitting else "but none with this model", fitting or swarms))


def nobody_found() -> str:
    """What to check when no swarm was heard."""
    return (
        "no swarm was found on this network: check that a node runs with swarm-node serve MODEL --lan, that this "
        "machine is in the same network (Wi-Fi for guests keeps machines apart), and that no firewall drops multicast "
        "DNS (UDP port 5353); or give a node's address with --initial-peers"
    )


def _several(which: str, swarms: Sequence[LanSwarm]) -> str:
    names = ", ".join(map(str, swarms))
    example = shlex.quote(swarms[0].name)
    return f"there are several swarms on this network {which}, {names}: say which, as in --lan-name {example}"
