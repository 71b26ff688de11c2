"""What the user asks of a node: each option of ``swarm-node`` stands here or in ``PeerOptions``."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

from swarm.commands.options import WEIGHTS, CacheDir, DhtPrefix, Manifest
from swarm.network.options import PeerOptions
from swarm.option import MEGABYTES, NETWORK, PATHS, Option

_MODEL, _BLOCKS, _COMPUTE, _OUTPUT = "Model", "Which blocks", "Computing", "Output"


class LogFormat(str, Enum):
    """How a node talks."""

    text = "text"
    json = "json"


Format = Annotated[
    LogFormat,
    Option("text for people, json for scripts: one object a line.", env="SWARM_LOG_FORMAT", panel=_OUTPUT),
]


@dataclass(frozen=True)
class NodeSettings:
    """All settings of ``swarm-node serve``; ``None`` and ``"auto"`` leave the choice to the node.

    Attributes:
        upload_rate: bytes per second; 0 for no limit.
        update_period: seconds between two announcements.
        store: the directory into which weights from peers go; default: one in the cache.
    """

    model: Annotated[
        str,
        Option("A directory, a Hugging Face Hub id, or demo, the built-in model.", env="SWARM_MODEL", positional=True),
    ]
    blocks: Annotated[
        str | None, Option("Serve these blocks.", env="SWARM_BLOCKS", panel=_BLOCKS, metavar="START:END")
    ] = None
    num_blocks: Annotated[
        int | None,
        Option(
            "Serve this many blocks, where the swarm is thinnest; fewer where some can't be apart. "
            "Default: as many as fit in memory.",
            env="SWARM_NUM_BLOCKS",
            panel=_BLOCKS,
            min=1,
        ),
    ] = None
    balance_quality: Annotated[
        float,
        Option(
            "Without --blocks: move to other blocks when the swarm's weakest ones have less than this share of "
            "the throughput that they would have then. 0: never.",
            env="SWARM_BALANCE_QUALITY",
            panel=_BLOCKS,
            min=0,
            max=1,
        ),
    ] = 0.75
    balance_period: Annotated[
        float,
        Option(
            "Seconds between two looks whether to move, on average.",
            env="SWARM_MEAN_BALANCE_CHECK_PERIOD",
            panel=_BLOCKS,
            flags=("--mean-balance-check-period",),
            min=0.1,
        ),
    ] = 120.0
    peer: PeerOptions = field(default_factory=PeerOptions)
    dht_prefix: DhtPrefix = None
    name: Annotated[str | None, Option("Shown to others in the swarm's status.", env="SWARM_NAME", panel=NETWORK)] = (
        None
    )
    device: Annotated[
        str,
        Option("auto, cpu, cuda (all GPUs), cuda:N, cuda:N,cuda:M,… or mps.", env="SWARM_DEVICE", panel=_COMPUTE),
    ] = "auto"
    dtype: Annotated[
        str,
        Option("auto (the checkpoint's), float32, bfloat16 or float16.", env="SWARM_DTYPE", panel=_COMPUTE),
    ] = "auto"
    quantization: Annotated[
        str,
        Option(
            "Bits of the weights. checkpoint: as they are there, for exactly the tokens of the whole model; those "
            "of a quantized one stay packed where there is a kernel, or if the blocks asked for don't fit otherwise. "
            "none: dequantized. int8 (half the memory), nf4, int4 (a quarter): more blocks fit, with a small error. "
            "auto: checkpoint if that is quantized or all that is asked for fits, else nf4. packed: as checkpoint, "
            "even if it is slow. int8 on a GPU and nf4 need bitsandbytes.",
            env="SWARM_QUANTIZATION",
            panel=_COMPUTE,
            metavar="checkpoint|none|int8|nf4|int4|auto|packed",
        ),
    ] = "checkpoint"
    cache_tokens: Annotated[
        int | None,
        Option(
            "KV cache in tokens, shared by all sessions. Default: four times 4096, or the positions of a model "
            "that has fewer, and half of the memory left then, up to 32 times.",
            env="SWARM_CACHE_TOKENS",
            panel=_COMPUTE,
            min=16,
        ),
    ] = None
    max_batch_tokens: Annotated[
        int,
        Option(
            "Tokens computed in one turn; longer prompts are cut, so that other sessions keep moving.",
            env="SWARM_MAX_BATCH_TOKENS",
            panel=_COMPUTE,
            min=1,
        ),
    ] = 512
    deterministic: Annotated[
        bool,
        Option(
            "Give a session the same bits whoever else uses this node, at the cost of some speed.",
            env="SWARM_DETERMINISTIC",
            panel=_COMPUTE,
        ),
    ] = False
    adapters: Annotated[
        tuple[str, ...],
        Option(
            "LoRA adapter that PEFT has saved, served beside the base weights; several: repeat it or separate "
            "them by commas. Clients ask for it by NAME: by default the directory's name, or the Hub id.",
            env="SWARM_ADAPTERS",
            panel=_MODEL,
            metavar="[NAME=]DIR_OR_ID[@REVISION]",
            form=PATHS,
        ),
    ] = ()
    idle_timeout: Annotated[
        float,
        Option(
            "Seconds after which an idle session ends. Its client replays it elsewhere, or here, when it goes on.",
            env="SWARM_IDLE_TIMEOUT",
            panel=_COMPUTE,
            min=1,
        ),
    ] = 900.0
    idle_seconds: Annotated[
        float,
        Option(
            "Seconds after which an idle session ends if others wait for room in the KV cache.",
            env="SWARM_IDLE_SECONDS",
            panel=_COMPUTE,
            min=0.1,
        ),
    ] = 60.0
    weights: Annotated[
        str,
        Option(
            "Where the weights come from. hub: a directory here, or else the Hub. peers: other nodes; MODEL is "
            "then its name in the swarm. auto: what is here whole, else peers, else the Hub; what is here is hashed, "
            "once, and handed out.",
            env="SWARM_WEIGHTS",
            panel=WEIGHTS,
            metavar="hub|peers|auto",
        ),
    ] = "hub"
    seed: Annotated[
        bool,
        Option(
            "Hand out the weights to other nodes. Hashes the whole checkpoint first, once; a Hub model is "
            "downloaded whole.",
            env="SWARM_SEED",
            panel=WEIGHTS,
        ),
    ] = False
    manifest: Manifest = None
    upload_rate: Annotated[
        float,
        Option(
            "MB/s of weights that are sent to others at most; 0: no limit.",
            env="SWARM_UPLOAD_RATE",
            panel=WEIGHTS,
            min=0,
            form=MEGABYTES,
        ),
    ] = 0.0
    revision: Annotated[str | None, Option("Branch, tag or commit on the Hub.", env="SWARM_REVISION", panel=_MODEL)] = (
        None
    )
    token: Annotated[str | None, Option("Hub token for gated models.", env="HF_TOKEN", panel=_MODEL)] = None
    cache_dir: CacheDir = None
    log_format: Format = LogFormat.text
    metrics_port: Annotated[
        int | None,
        Option(
            "Serve Prometheus metrics on this port of --host.",
            env="SWARM_METRICS_PORT",
            panel=_OUTPUT,
            min=1,
            max=65535,
        ),
    ] = None
    update_period: float = 20.0
    store: Path | None = None


@dataclass(frozen=True)
class FetchSettings(NodeSettings):
    """Settings of ``swarm-node fetch``, where some options mean something else."""

    model: Annotated[str, Option("The model's name in the swarm.", env="SWARM_MODEL", positional=True)]
    blocks: Annotated[
        str | None, Option("Only these blocks.", env="SWARM_BLOCKS", panel=_BLOCKS, metavar="START:END")
    ] = None
    store: Annotated[
        Path | None,
        Option(
            "Into this directory; default: where serve --weights peers looks.",
            panel=WEIGHTS,
            flags=("--to",),
            metavar="DIR",
        ),
    ] = None
