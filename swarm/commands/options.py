"""Options that the commands of both sides have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NETWORK, WEIGHTS = "Network", "Weights"
CONTEXT = {"help_option_names": ["-h", "--help"]}

Model = Annotated[
    str, typer.Argument(envvar="SWARM_MODEL", help="A directory, a Hugging Face Hub id, or demo, the built-in model.")
]
InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        envvar="SWARM_INITIAL_PEERS",
        metavar="MADDR",
        help="Address of a node in the swarm, /ip4/…/tcp/…/p2p/…, as swarm-node serve prints it; several: repeat it or "
        "separate them by commas. For swarm-node, none starts a new private swarm.",
        rich_help_panel=NETWORK,
    ),
]
DhtPrefix = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_DHT_PREFIX", help="The model's name in the swarm; default: from MODEL.", rich_help_panel=NETWORK
    ),
]
Manifest = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_MANIFEST",
        metavar="HASH",
        help="Take only the weights with this manifest, as swarm-node seed prints it: then nobody needs to be trusted.",
        rich_help_panel=WEIGHTS,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        envvar="SWARM_CACHE_DIR",
        help="Where downloads are kept; default: the Hub's own cache.",
        rich_help_panel=WEIGHTS,
    ),
]


def split_list(values: list[str] | None) -> tuple[str, ...]:
    """Repeated and comma-separated values as one list."""
    return tuple(part for value in values or () for part in value.replace(",", " ").split())
