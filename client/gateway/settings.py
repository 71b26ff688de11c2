"""What the user asks of a gateway."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from swarm.commands.options import DhtPrefix
from swarm.network.options import InitialPeers, KeyOptions, Keys, LanOptions
from swarm.option import LIST, NETWORK, Form, Option

from ..commands.options import Ends
from ..settings import ClientSettings, WaitTimeout

_LIMITS, _ACCESS = "Limits", "Access"

KeysFile = Annotated[
    Path,
    Option(
        "SQLite file with API keys and usage.",
        env="SWARM_KEYS_FILE",
        panel=_ACCESS,
        metavar="FILE",
        form=Form(Path, Path.expanduser, Path),
    ),
]
KEYS_FILE = Path("~/.swarm/gateway.sqlite")


@dataclass(frozen=True)
class GatewaySettings:
    """All settings of ``swarm gateway serve``. ``local_nodes`` counts with ``local`` only."""

    models: Annotated[
        tuple[str, ...],
        Option(
            "Directories, Hugging Face Hub ids, or demo.",
            metavar="MODEL…",
            form=Form(list[str], tuple, list),
            positional=True,
        ),
    ]
    initial_peers: InitialPeers = ()
    lan: LanOptions = field(default_factory=LanOptions)
    key: Keys = field(default_factory=KeyOptions)
    local: Annotated[bool, Option("Start a private swarm for MODEL beside it.", panel=NETWORK)] = False
    local_nodes: Annotated[int, Option("With --local: how many nodes.", panel=NETWORK, min=1)] = 2
    host: Annotated[str, Option("Address to listen on.", env="SWARM_GATEWAY_HOST", panel=NETWORK)] = "127.0.0.1"
    port: Annotated[
        int, Option("TCP port; 0 takes a free one.", env="SWARM_GATEWAY_PORT", panel=NETWORK, min=0, max=65535)
    ] = 8000
    dht_prefix: DhtPrefix = None
    wait_timeout: WaitTimeout = ClientSettings.wait_timeout
    ends: Ends = field(default_factory=Ends)
    max_sessions: Annotated[int, Option("Texts that are generated at a time.", panel=_LIMITS, min=1)] = 64
    max_queue: Annotated[int, Option("How many more wait for their turn; others get 429.", panel=_LIMITS, min=0)] = 256
    keys_file: KeysFile = KEYS_FILE
    no_auth: Annotated[bool, Option("Let everybody in who reaches the address.", panel=_ACCESS)] = False
    cors_origins: Annotated[
        tuple[str, ...],
        Option(
            "Web origin whose pages may use the API.",
            panel=_ACCESS,
            flags=("--cors-origin",),
            metavar="ORIGIN",
            form=LIST,
        ),
    ] = ()
    log_prompts: Annotated[bool, Option("Write prompts to the log too.")] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial_peers", self.key.peers(self.initial_peers))
