"""``swarm gateway …``: needs nothing of the extra until the gateway starts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from swarm.commands.options import NETWORK, CacheDir, DhtPrefix, InitialPeers, Manifest, split_list
from swarm.commands.terminal import outlive_readers
from swarm.errors import UsageError

from ..cli import WaitTimeout, Weights, errors

_LIMITS, _ACCESS = "Limits", "Access"
INSTALL = "the gateway needs more packages: pip install 'swarm-llm[gateway]'"


class _ServeByDefault(TyperGroup):
    """``swarm gateway MODEL`` is ``swarm gateway serve MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


gateway = typer.Typer(
    cls=_ServeByDefault,
    no_args_is_help=True,
    help="An OpenAI-compatible HTTP API: swarm gateway MODEL… --initial-peers … "
    "(short for swarm gateway serve; its options: swarm gateway serve --help).",
)
keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway.")
gateway.add_typer(keys, name="keys")

KeysFile = Annotated[
    Path,
    typer.Option(
        envvar="SWARM_KEYS_FILE", metavar="FILE", help="SQLite file with API keys and usage.", rich_help_panel=_ACCESS
    ),
]
_KEYS_FILE = Path("~/.swarm/gateway.sqlite")


@gateway.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Directories, Hugging Face Hub ids, or demo.")],
    initial_peers: InitialPeers = None,
    local: Annotated[
        bool, typer.Option("--local", help="Start a private swarm for MODEL beside it.", rich_help_panel=NETWORK)
    ] = False,
    local_nodes: Annotated[int, typer.Option(min=1, help="With --local: how many nodes.", rich_help_panel=NETWORK)] = 2,
    host: Annotated[
        str, typer.Option(envvar="SWARM_GATEWAY_HOST", help="Address to listen on.", rich_help_panel=NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar="SWARM_GATEWAY_PORT",
            min=0,
            max=65535,
            help="TCP port; 0 takes a free one.",
            rich_help_panel=NETWORK,
        ),
    ] = 8000,
    dht_prefix: DhtPrefix = None,
    wait_timeout: WaitTimeout = 60.0,
    weights: Weights = "hub",
    manifest: Manifest = None,
    cache_dir: CacheDir = None,
    max_sessions: Annotated[
        int, typer.Option(min=1, help="Texts that are generated at a time.", rich_help_panel=_LIMITS)
    ] = 64,
    max_queue: Annotated[
        int,
        typer.Option(min=0, help="How many more wait for their turn; others get 429.", rich_help_panel=_LIMITS),
    ] = 256,
    keys_file: KeysFile = _KEYS_FILE,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Let everybody in who reaches the address.", rich_help_panel=_ACCESS),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web origin whose pages may use the API.", rich_help_panel=_ACCESS),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log too.")] = False,
) -> None:
    """Serve an OpenAI-compatible API for models of a swarm. stdout gets a JSON object for each request."""
    outlive_readers()
    with errors():
        peers = split_list(initial_peers)
        if local and (peers or len(models) > 1):
            raise UsageError("--local starts a swarm of its own, for one model: leave out --initial-peers")
        if not local and not peers:
            raise UsageError("say which swarm: --initial-peers MADDR, or start one on this machine with --local")
        if dht_prefix is not None and len(models) > 1:
            raise UsageError("--dht-prefix is the name of one model: leave it out, or start a gateway for each model")
        if manifest is not None and len(models) > 1:
            raise UsageError("--manifest is of one model's weights: leave it out, or start a gateway for each model")
        try:
            from .server import GatewaySettings, run
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("swarm", "torch", "transformers")):
                raise
            raise UsageError(f"{INSTALL} ({error.name} is missing)") from error
        run(
            GatewaySettings(
                models=tuple(models),
                initial_peers=peers,
                host=host,
                port=port,
                keys_file=keys_file.expanduser(),
                max_sessions=max_sessions,
                max_queue=max_queue,
                no_auth=no_auth,
                cors_origins=split_list(cors_origin),
                local_nodes=local_nodes if local else 0,
                dht_prefix=dht_prefix,
                wait_timeout=wait_timeout,
                log_prompts=log_prompts,
                weights="hub" if local else weights,
                manifest=None if local else manifest,
                cache_dir=cache_dir,
            )
        )


@keys.command("add")
def add_key(
    name: str,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Default: no limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Default: no limit.")] = None,
    keys_file: KeysFile = _KEYS_FILE,
) -> None:
    """Make a key and print it, this once. A gateway that runs knows it at once."""
    from .access.keys import KeyStore

    with errors():
        store = KeyStore(keys_file.expanduser())
        print(store.add(name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute))
        print("Keep it: it can't be shown again.", file=sys.stderr)


@keys.command("list")
def list_keys(keys_file: KeysFile = _KEYS_FILE) -> None:
    """Show all keys, their limits, and what they were used for."""
    from rich.console import Console
    from rich.table import Table

    from .access.keys import KeyStore

    with errors():
        table = Table()
        for column in ("name", "made", "requests/min", "tokens/min", "requests", "prompt tokens", "completion tokens"):
            table.add_column(column)
        for used in KeyStore(keys_file.expanduser()).list():
            limits = (used.key.requests_per_minute, used.key.tokens_per_minute)
            table.add_row(
                used.key.name,
                time.strftime("%Y-%m-%d", time.localtime(used.created)),
                *("-" if limit is None else str(limit) for limit in limits),
                str(used.requests),
                str(used.prompt_tokens),
                str(used.completion_tokens),
            )
        Console().print(table)


@keys.command("remove")
def remove_key(name: str, keys_file: KeysFile = _KEYS_FILE) -> None:
    """End a key. A gateway that runs refuses it at once."""
    from .access.keys import KeyStore

    with errors():
        KeyStore(keys_file.expanduser()).remove(name)
