"""Options that the commands of both sides have."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..option import NETWORK, Option

WEIGHTS = "Weights"
CONTEXT = {"help_option_names": ["-h", "--help"]}

DhtPrefix = Annotated[
    str | None, Option("The model's name in the swarm; default: from MODEL.", env="SWARM_DHT_PREFIX", panel=NETWORK)
]
Manifest = Annotated[
    str | None,
    Option(
        "Take only the weights with this manifest, as swarm-node seed prints it: then nobody needs to be trusted.",
        env="SWARM_MANIFEST",
        panel=WEIGHTS,
        metavar="HASH",
    ),
]
CacheDir = Annotated[
    Path | None,
    Option("Where downloads are kept; default: the Hub's own cache.", env="SWARM_CACHE_DIR", panel=WEIGHTS),
]


@dataclass(frozen=True)
class View:
    """How a swarm is shown."""

    as_json: Annotated[bool, Option("Print one JSON object and exit.", flags=("--json",))] = False
    once: Annotated[bool, Option("Print the table once and exit.")] = False
    interval: Annotated[float, Option("Seconds between two looks.", min=0.2)] = 2.0
