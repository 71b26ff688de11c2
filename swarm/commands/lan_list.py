"""``swarm list``: the swarms on the local network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..network.lan.choice import LanSwarm, nobody_found
from ..network.lan.look import look


async def show_swarms(seconds: float, *, as_json: bool) -> None:
    """Prints those that are heard within ``seconds``.

    Raises:
        ConnectError: there is no network to listen on.
    """
    swarms = await look(seconds)
    if as_json:
        print(json.dumps({"swarms": [{**asdict(swarm), "models": swarm.models} for swarm in swarms]}))
    elif swarms:
        Console().print(swarms_view(swarms))
    else:
        print(nobody_found())


def swarms_view(swarms: Sequence[LanSwarm]) -> Table:
    """A row for each node."""
    table = Table(title="Swarms on this network")
    for column in ("name", "model", "node", "address", "version"):
        table.add_column(column)
    for swarm in swarms:
        for number, node in enumerate(swarm.nodes):
            shown = (
                swarm.name if not number else "",
                node.model or "none",
                "…" + node.peer_id[-8:],
                "\n".join(node.maddrs),
                node.version,
            )
            table.add_row(*map(Text, shown), end_section=number + 1 == len(swarm.nodes))  # Text: it is a stranger's
    return table
