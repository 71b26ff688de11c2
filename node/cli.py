"""The command ``swarm-node``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.options import (
    CONTEXT,
    NETWORK,
    WEIGHTS,
    CacheDir,
    DhtPrefix,
    InitialPeers,
    Manifest,
    Model,
    split_list,
)
from swarm.commands.terminal import explain, flush, outlive_readers
from swarm.commands.terminal import run as run_command
from swarm.compat.late_imports import defer_imports, importing
from swarm.compute.openmp import set_waiting
from swarm.errors import UsageError

if TYPE_CHECKING:
    from .output import Output

app = typer.Typer(
    name="swarm-node",
    help="Contribute to a swarm: serve some of a model's blocks to everyone in it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

_BLOCKS, _COMPUTE, _OUTPUT = "Which blocks", "Computing", "Output"


class LogFormat(str, Enum):
    """How a node talks."""

    text = "text"
    json = "json"


Host = Annotated[str, typer.Option(envvar="SWARM_HOST", help="Address to listen on.", rich_help_panel=NETWORK)]
Port = Annotated[
    int,
    typer.Option(envvar="SWARM_PORT", min=0, max=65535, help="TCP port; 0 takes a free one.", rich_help_panel=NETWORK),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        envvar="SWARM_ANNOUNCE",
        metavar="MADDR",
        help="Tell others this address instead of those found.",
        rich_help_panel=NETWORK,
    ),
]
PublicIp = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_PUBLIC_IP", help="IP under which --port is reached from outside.", rich_help_panel=NETWORK
    ),
]
Relay = Annotated[
    bool,
    typer.Option(
        "--relay/--no-relay",
        envvar="SWARM_RELAY",
        help="Be reached through relays: for a machine behind a NAT or firewall.",
        rich_help_panel=NETWORK,
    ),
]
Identity = Annotated[
    Path | None,
    typer.Option(
        envvar="SWARM_IDENTITY",
        metavar="FILE",
        help="File with this peer's key, made when missing; keeps the PeerID over restarts.",
        rich_help_panel=NETWORK,
    ),
]
UploadRate = Annotated[
    float,
    typer.Option(
        envvar="SWARM_UPLOAD_RATE",
        min=0,
        help="MB/s of weights that are sent to others at most; 0: no limit.",
        rich_help_panel=WEIGHTS,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(envvar="SWARM_REVISION", help="Branch, tag or commit on the Hub.", rich_help_panel="Model"),
]
Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", help="Hub token for gated models.", rich_help_panel="Model")
]
Format = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar="SWARM_LOG_FORMAT",
        help="text for people, json for scripts: one object a line.",
        rich_help_panel=_OUTPUT,
    ),
]


@app.command()
def serve(
    model: Model,
    blocks: Annotated[
        str | None,
        typer.Option(envvar="SWARM_BLOCKS", metavar="START:END", help="Serve these blocks.", rich_help_panel=_BLOCKS),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_NUM_BLOCKS",
            min=1,
            help="Serve this many blocks, where the swarm is thinnest; fewer where some can't be apart. "
            "Default: as many as fit in memory.",
            rich_help_panel=_BLOCKS,
        ),
    ] = None,
    balance_quality: Annotated[
        float,
        typer.Option(
            envvar="SWARM_BALANCE_QUALITY",
            min=0,
            max=1,
            help="Without --blocks: move to other blocks when the swarm's weakest ones have less than this share of "
            "the throughput that they would have then. 0: never.",
            rich_help_panel=_BLOCKS,
        ),
    ] = 0.75,
    mean_balance_check_period: Annotated[
        float,
        typer.Option(
            envvar="SWARM_MEAN_BALANCE_CHECK_PERIOD",
            min=0.1,
            help="Seconds between two looks whether to move, on average.",
            rich_help_panel=_BLOCKS,
        ),
    ] = 120.0,
    initial_peers: InitialPeers = None,
    host: Host = "0.0.0.0",
    port: Port = 0,
    announce: Announce = None,
    public_ip: PublicIp = None,
    relay: Relay = False,
    identity: Identity = None,
    dht_prefix: DhtPrefix = None,
    name: Annotated[
        str | None,
        typer.Option(envvar="SWARM_NAME", help="Shown to others in the swarm's status.", rich_help_panel=NETWORK),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            envvar="SWARM_DEVICE",
            help="auto, cpu, cuda (all GPUs), cuda:N, cuda:N,cuda:M,… or mps.",
            rich_help_panel=_COMPUTE,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            envvar="SWARM_DTYPE",
            help="auto (the checkpoint's), float32, bfloat16 or float16.",
            rich_help_panel=_COMPUTE,
        ),
    ] = "auto",
    quantization: Annotated[
        str,
        typer.Option(
            envvar="SWARM_QUANTIZATION",
            metavar="checkpoint|none|int8|nf4|int4|auto|packed",
            help="Bits of the weights. checkpoint: as they are there, for exactly the tokens of the whole model; those "
            "of a quantized one stay packed where there is a kernel, or if the blocks asked for don't fit otherwise. "
            "none: dequantized. int8 (half the memory), nf4, int4 (a quarter): more blocks fit, with a small error. "
            "auto: checkpoint if that is quantized or all that is asked for fits, else nf4. packed: as checkpoint, "
            "even if it is slow. int8 on a GPU and nf4 need bitsandbytes.",
            rich_help_panel=_COMPUTE,
        ),
    ] = "checkpoint",
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_CACHE_TOKENS",
            min=16,
            help="KV cache in tokens, shared by all sessions. Default: four times 4096, or the positions of a model "
            "that has fewer, and half of the memory left then, up to 32 times.",
            rich_help_panel=_COMPUTE,
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int,
        typer.Option(
            envvar="SWARM_MAX_BATCH_TOKENS",
            min=1,
            help="Tokens computed in one turn; longer prompts are cut, so that other sessions keep moving.",
            rich_help_panel=_COMPUTE,
        ),
    ] = 512,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            envvar="SWARM_DETERMINISTIC",
            help="Give a session the same bits whoever else uses this node, at the cost of some speed.",
            rich_help_panel=_COMPUTE,
        ),
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SWARM_ADAPTERS",
            metavar="[NAME=]DIR_OR_ID[@REVISION]",
            help="LoRA adapter that PEFT has saved, served beside the base weights; several: repeat it or separate "
            "them by commas. Clients ask for it by NAME: by default the directory's name, or the Hub id.",
            rich_help_panel="Model",
        ),
    ] = None,
    idle_timeout: Annotated[
        float,
        typer.Option(
            envvar="SWARM_IDLE_TIMEOUT",
            min=1,
            help="Seconds after which an idle session ends. Its client replays it elsewhere, or here, when it goes on.",
            rich_help_panel=_COMPUTE,
        ),
    ] = 900.0,
    idle_seconds: Annotated[
        float,
        typer.Option(
            envvar="SWARM_IDLE_SECONDS",
            min=0.1,
            help="Seconds after which an idle session ends if others wait for room in the KV cache.",
            rich_help_panel=_COMPUTE,
        ),
    ] = 60.0,
    weights: Annotated[
        str,
        typer.Option(
            envvar="SWARM_WEIGHTS",
            metavar="hub|peers|auto",
            help="Where the weights come from. hub: a directory here, or else the Hub. peers: other nodes; MODEL is "
            "then its name in the swarm. auto: what is here whole, else peers, else the Hub; what is here is hashed, "
            "once, and handed out.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "hub",
    seed: Annotated[
        bool,
        typer.Option(
            "--seed",
            envvar="SWARM_SEED",
            help="Hand out the weights to other nodes. Hashes the whole checkpoint first, once; a Hub model is "
            "downloaded whole.",
            rich_help_panel=WEIGHTS,
        ),
    ] = False,
    manifest: Manifest = None,
    upload_rate: UploadRate = 0.0,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    log_format: Format = LogFormat.text,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_METRICS_PORT",
            min=1,
            max=65535,
            help="Serve Prometheus metrics on this port.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Serve some of MODEL's blocks.

    Without --initial-peers this starts a new private swarm and prints the line with which others join it.
    """
    output = _output(log_format)
    output.event("starting", f"Starting a node for {model}…", model=model)

    async def run(stop: asyncio.Event) -> None:
        if blocks is not None and num_blocks is not None:
            raise UsageError("--blocks and --num-blocks can't be given together")
        with importing():
            from swarm.network.peer import PeerOptions

            from .hosting.server import serve as serve_node
            from .settings import NodeSettings

        settings = NodeSettings(
            model=model,
            peer=PeerOptions(
                initial_peers=split_list(initial_peers),
                host=host,
                port=port,
                announce=split_list(announce),
                public_ip=public_ip,
                relay=relay,
                identity=identity,
            ),
            blocks=blocks,
            num_blocks=num_blocks,
            balance_quality=balance_quality,
            balance_period=mean_balance_check_period,
            device=device,
            dtype=dtype,
            quantization=quantization,
            cache_tokens=cache_tokens,
            max_batch_tokens=max_batch_tokens,
            deterministic=deterministic,
            idle_timeout=idle_timeout,
            idle_seconds=idle_seconds,
            dht_prefix=dht_prefix,
            name=name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            metrics_port=metrics_port,
            adapters=tuple(part for value in adapters or () for part in value.split(",") if part),
            weights=weights,
            seed=seed,
            manifest=manifest,
            upload_rate=upload_rate * 1e6,
        )
        await serve_node(settings, output, stop)

    _run_until_stopped(run, output.error)


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(envvar="SWARM_MODEL", help="The model's name in the swarm.")],
    initial_peers: InitialPeers = None,
    blocks: Annotated[
        str | None,
        typer.Option(envvar="SWARM_BLOCKS", metavar="START:END", help="Only these blocks.", rich_help_panel=_BLOCKS),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Into this directory; default: where serve --weights peers looks.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    manifest: Manifest = None,
    upload_rate: UploadRate = 0.0,
    host: Host = "0.0.0.0",
    port: Port = 0,
    announce: Announce = None,
    public_ip: PublicIp = None,
    relay: Relay = False,
    dht_prefix: DhtPrefix = None,
    cache_dir: CacheDir = None,
    log_format: Format = LogFormat.text,
) -> None:
    """Get a model's weights from the nodes that have them, and end.

    Without --blocks the result is a directory that any program can use. What an earlier run got is not fetched again.
    """
    output = _output(log_format)

    async def run(stop: asyncio.Event) -> None:
        from swarm.network.peer import PeerOptions

        from .commands.weights import fetch as fetch_weights
        from .settings import NodeSettings

        peers = split_list(initial_peers)
        if not peers:
            raise UsageError("say which swarm: --initial-peers MADDR")
        options = PeerOptions(
            initial_peers=peers, host=host, port=port, announce=split_list(announce), public_ip=public_ip, relay=relay
        )
        settings = NodeSettings(
            model=model,
            peer=options,
            blocks=blocks,
            dht_prefix=dht_prefix,
            manifest=manifest,
            upload_rate=upload_rate * 1e6,
            cache_dir=cache_dir,
            store=to,
        )
        await fetch_weights(settings, output, stop)

    _run_until_stopped(run, output.error)


@app.command()
def seed(
    model: Model,
    initial_peers: InitialPeers = None,
    manifest: Manifest = None,
    upload_rate: UploadRate = 0.0,
    host: Host = "0.0.0.0",
    port: Port = 0,
    announce: Announce = None,
    public_ip: PublicIp = None,
    relay: Relay = False,
    identity: Identity = None,
    dht_prefix: DhtPrefix = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    log_format: Format = LogFormat.text,
) -> None:
    """Hand out the weights of MODEL, and serve no blocks. Hashes the whole checkpoint first, once."""
    output = _output(log_format)

    async def run(stop: asyncio.Event) -> None:
        from swarm.network.peer import PeerOptions

        from .commands.weights import seed as seed_weights
        from .settings import NodeSettings

        options = PeerOptions(
            initial_peers=split_list(initial_peers),
            host=host,
            port=port,
            announce=split_list(announce),
            public_ip=public_ip,
            relay=relay,
            identity=identity,
        )
        settings = NodeSettings(
            model=model,
            peer=options,
            dht_prefix=dht_prefix,
            manifest=manifest,
            upload_rate=upload_rate * 1e6,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
        )
        await seed_weights(settings, output, stop)

    _run_until_stopped(run, output.error)


@app.command()
def bootstrap(
    initial_peers: InitialPeers = None,
    host: Host = "0.0.0.0",
    port: Port = 31337,
    announce: Announce = None,
    public_ip: PublicIp = None,
    identity: Identity = None,
    log_format: Format = LogFormat.text,
) -> None:
    """Run a peer that serves no blocks: a fixed address to join a swarm by, and a relay for nodes behind firewalls."""
    output = _output(log_format)

    async def run(stop: asyncio.Event) -> None:
        from swarm.network.peer import Peer, PeerOptions

        peer = await Peer.start(
            PeerOptions(
                initial_peers=split_list(initial_peers),
                host=host,
                port=port,
                announce=split_list(announce),
                public_ip=public_ip,
                identity=identity,
                serve_relay=True,
            )
        )
        lines = ["Others join with:", *(f"  --initial-peers {address}" for address in peer.addresses)]
        output.panel(
            "ready", "Bootstrap peer is up", lines, maddrs=list(peer.addresses), peer_id=peer.peer_id.to_base58()
        )
        await stop.wait()
        await peer.stop()
        output.event("stopped", "Stopped.")

    _run_until_stopped(run, output.error)


@app.command()
def status(
    model: Model,
    initial_peers: InitialPeers = None,
    dht_prefix: DhtPrefix = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and exit.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show who serves which blocks of MODEL, how fast, what is free, and where blocks are missing."""
    from swarm.commands.status import show, watch

    async def run(stop: asyncio.Event) -> None:
        peers = split_list(initial_peers)
        if not peers:
            raise UsageError("say which swarm: --initial-peers MADDR")
        overviews = watch(model, peers, dht_prefix=dht_prefix, interval=interval)
        await show(overviews, as_json=as_json, once=once, top=False, stop=stop)

    _run_until_stopped(run, lambda text: print(f"Error: {text}", file=sys.stderr))


def _output(log_format: LogFormat) -> Output:
    from .output import make_output

    outlive_readers()
    return make_output(log_format.value)


def _run_until_stopped(run: Callable[[asyncio.Event], Awaitable[None]], say_error: Callable[[str], None]) -> None:
    """Runs with SIGINT and SIGTERM as an orderly stop, and ends the process with 0, 1 or 2."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await run(stop)

    code = 0
    try:
        import uvloop

        uvloop.run(main())
    except SystemExit as end:  # rich's, when nobody reads any more
        code = int(end.code or 0)
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        if failure.text:
            say_error(failure.text)
        code = failure.code
    os._exit(
        flush() or code
    )  # a load that was given up may still run in its thread; nothing is left that must be waited for


def main() -> None:
    """Entry point of ``swarm-node``."""
    set_waiting()  # both before torch is imported
    defer_imports()
    run_command(app)
