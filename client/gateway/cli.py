"""``swarm gateway …``: needs nothing of the extra until the gateway starts."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from swarm.commands.builder import takes_settings
from swarm.commands.terminal import outlive_readers
from swarm.errors import UsageError
from swarm.network.options import KeyOptions
from swarm.option import Option

from ..commands.errors import errors
from .settings import KEYS_FILE, GatewaySettings, KeysFile

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
Name = Annotated[str, Option(positional=True)]
Limit = Annotated[int | None, Option("Default: no limit.", min=1)]


@gateway.command()
@takes_settings
@errors()
def serve(settings: GatewaySettings) -> None:
    """Serve an OpenAI-compatible API for models of a swarm. stdout gets a JSON object for each request."""
    outlive_readers()
    _check(settings)
    try:
        from .server import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("swarm", "torch", "transformers")):
            raise
        raise UsageError(f"{INSTALL} ({error.name} is missing)") from error
    if settings.local:  # its nodes read MODEL here, and so do the ends; nobody else reaches them, so there is no key
        ends = replace(settings.ends, weights="hub", manifest=None)
        settings = replace(settings, key=KeyOptions(), ends=ends)
    run(settings)


def _check(settings: GatewaySettings) -> None:
    several = len(settings.models) > 1
    asked = settings.initial_peers or settings.lan.wanted
    if settings.local and (asked or several):
        raise UsageError("--local starts a swarm of its own, for one model: leave out --initial-peers and --lan")
    if not settings.local and not asked:
        raise UsageError(
            "say which swarm: --lan for one on this network, --initial-peers MADDR, --join LINE for an invitation, or "
            "start one on this machine with --local"
        )
    if settings.dht_prefix is not None and several:
        raise UsageError("--dht-prefix is the name of one model: leave it out, or start a gateway for each model")
    if settings.ends.manifest is not None and several:
        raise UsageError("--manifest is of one model's weights: leave it out, or start a gateway for each model")


@keys.command("add")
@takes_settings
@errors()
def add_key(
    name: Name, requests_per_minute: Limit = None, tokens_per_minute: Limit = None, keys_file: KeysFile = KEYS_FILE
) -> None:
    """Make a key and print it, this once. A gateway that runs knows it at once."""
    from .access.keys import KeyStore

    key = KeyStore(keys_file).add(name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
    print(key)
    print("Keep it: it can't be shown again.", file=sys.stderr)


@keys.command("list")
@takes_settings
@errors()
def list_keys(keys_file: KeysFile = KEYS_FILE) -> None:
    """Show all keys, their limits, and what they were used for."""
    from rich.console import Console
    from rich.table import Table

    from .access.keys import KeyStore

    table = Table()
    for column in ("name", "made", "requests/min", "tokens/min", "requests", "prompt tokens", "completion tokens"):
        table.add_column(column)
    for used in KeyStore(keys_file).list():
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
@takes_settings
@errors()
def remove_key(name: Name, keys_file: KeysFile = KEYS_FILE) -> None:
    """End a key. A gateway that runs refuses it at once."""
    from .access.keys import KeyStore

    KeyStore(keys_file).remove(name)
