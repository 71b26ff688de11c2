"""What the commands of ``swarm`` can be told, in groups that several of them have."""

from dataclasses import dataclass, field
from typing import Annotated

from swarm.commands.options import WEIGHTS, CacheDir, DhtPrefix, Manifest
from swarm.errors import UsageError
from swarm.network.options import InitialPeers, KeyOptions, Keys, LanOptions
from swarm.option import NETWORK, Only, Option

from ..settings import ClientSettings

_SAMPLING = "Sampling"


@dataclass(frozen=True)
class Where:
    """Which model, and where it is: in a swarm, or behind a gateway."""

    model: Annotated[
        str | None,
        Option(
            "A directory, a Hugging Face Hub id, or demo, the built-in model. With --api, a name that it knows.",
            env="SWARM_MODEL",
            positional=True,
        ),
    ] = None
    initial_peers: InitialPeers = ()
    lan: LanOptions = field(default_factory=LanOptions)
    key: Keys = field(default_factory=KeyOptions)
    dht_prefix: DhtPrefix = None
    client: ClientSettings = field(default_factory=ClientSettings)
    api: Annotated[
        str | None,
        Option(
            "Ask a gateway (or another server with OpenAI's API) instead of joining the swarm.",
            env="SWARM_API",
            panel=NETWORK,
            metavar="URL",
        ),
    ] = None
    api_key: Annotated[str | None, Option("Key for --api, if it wants one.", env="SWARM_API_KEY", panel=NETWORK)] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial_peers", self.key.peers(self.initial_peers))

    def require(self) -> None:
        """
        Raises:
            UsageError: it says too little, or names both a swarm and a gateway.
        """
        if self.api is None and self.model is None:
            raise UsageError("say which MODEL, a directory or a Hub id, or where a gateway is: --api URL")
        if self.api is None and not self.initial_peers and not self.lan.wanted:
            raise UsageError(
                "say which swarm: --lan for one on this network, --initial-peers MADDR, as printed by swarm-node "
                "serve, --join LINE for an invitation, or a gateway: --api URL"
            )
        if self.api is not None and (self.initial_peers or self.lan.wanted):
            raise UsageError("--api and --initial-peers or --lan can't be given together: a gateway knows its swarm")
        if self.initial_peers and self.lan.wanted:
            raise UsageError("--initial-peers and --lan can't be given together: both say which swarm")


@dataclass(frozen=True)
class Ends:
    """Where the ends of the model come from."""

    weights: Annotated[
        str,
        Option(
            "Where embeddings, head, config and tokenizer come from. hub: a directory here, or else the Hub. peers: "
            "nodes that hand weights out; MODEL is then its name in the swarm. auto: a directory here, else peers, "
            "else the Hub.",
            env="SWARM_WEIGHTS",
            panel=WEIGHTS,
            metavar="hub|peers|auto",
        ),
    ] = "hub"
    manifest: Manifest = None
    cache_dir: CacheDir = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: Annotated[float, Option("0 takes the likeliest token every time.", panel=_SAMPLING, min=0)] = 0.0
    top_p: Annotated[float, Option("Sample from this share of the mass.", panel=_SAMPLING, min=0, max=1)] = 1.0
    top_k: Annotated[int, Option("Sample from so many tokens; 0: all.", panel=_SAMPLING, min=0)] = 0
    seed: Annotated[int | None, Option("Makes sampling repeatable.", panel=_SAMPLING)] = None


MaxNewTokens = Annotated[int, Option("How many tokens to generate at most.", min=1)]
_LOOKING = ("model", "initial_peers", "lan", "lan_name", "swarm_key", "join", "dht_prefix", "api", "api_key")
Looking = Annotated[Where, Only(*_LOOKING)]
