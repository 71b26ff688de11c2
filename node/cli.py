"""The command ``swarm-node``."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from swarm.commands.builder import takes_settings
from swarm.commands.hidden import hide_invitation
from swarm.commands.options import CONTEXT, View
from swarm.commands.terminal import run as run_command
from swarm.compat.late_imports import importing
from swarm.compute.openmp import set_waiting
from swarm.errors import UsageError
from swarm.network.lock.key import SwarmKey
from swarm.network.options import PeerOptions
from swarm.option import Only

from .commands.process import open_output, print_secret, run_until_stopped
from .settings import FetchSettings, Format, LogFormat, NodeSettings

app = typer.Typer(
    name="swarm-node",
    help="Contribute to a swarm: serve some of a model's blocks to everyone in it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

_BOOTSTRAP = PeerOptions(port=31337)
_FIND = ("lan", "lan_name", "swarm_key", "join")
_LISTEN = (*_FIND, "shut_out", "host", "port", "announce", "public_ip")


@app.command()
@takes_settings
def serve(settings: NodeSettings) -> None:
    """Serve some of MODEL's blocks.

    Without --initial-peers and --lan this starts a new private swarm and prints the line with which others join it.
    """
    output = open_output(settings.log_format)
    output.event("starting", f"Starting a node for {settings.model}…", model=settings.model)

    async def run(stop: asyncio.Event) -> None:
        if settings.blocks is not None and settings.num_blocks is not None:
            raise UsageError("--blocks and --num-blocks can't be given together")
        with importing():
            from .hosting.server import serve as serve_node
        await serve_node(settings, output, stop)

    run_until_stopped(run, output.error)


_FETCH = Only(
    *("model", "initial_peers", "blocks", "store", "manifest", "upload_rate", *_LISTEN, "relay"),
    *("dht_prefix", "cache_dir", "log_format"),
)


@app.command()
@takes_settings
def fetch(settings: Annotated[FetchSettings, _FETCH]) -> None:
    """Get a model's weights from the nodes that have them, and end.

    Without --blocks the result is a directory that any program can use. What an earlier run got is not fetched again.
    """
    output = open_output(settings.log_format)

    async def run(stop: asyncio.Event) -> None:
        with importing():
            from .commands.weights import fetch as fetch_weights

        _require_peers(settings.peer)
        await fetch_weights(settings, output, stop)

    run_until_stopped(run, output.error)


_SEED = Only(
    *("model", "initial_peers", "manifest", "upload_rate", *_LISTEN, "relay", "identity"),
    *("dht_prefix", "revision", "token", "cache_dir", "log_format"),
)


@app.command()
@takes_settings
def seed(settings: Annotated[NodeSettings, _SEED]) -> None:
    """Hand out the weights of MODEL, and serve no blocks. Hashes the whole checkpoint first, once."""
    output = open_output(settings.log_format)

    async def run(stop: asyncio.Event) -> None:
        with importing():
            from .commands.weights import seed as seed_weights

        await seed_weights(settings, output, stop)

    run_until_stopped(run, output.error)


@app.command()
@takes_settings
def bootstrap(
    options: Annotated[PeerOptions, Only("initial_peers", *_LISTEN, "identity")] = _BOOTSTRAP,
    log_format: Format = LogFormat.text,
) -> None:
    """Run a peer that serves no blocks: a fixed address to join a swarm by, and a relay for nodes behind firewalls."""
    output = open_output(log_format)

    async def run(stop: asyncio.Event) -> None:
        with importing():
            from swarm.network.lan.join import flags, start_peer

            from .hosting.invitation import how_to_unlock

        peer = await start_peer(options, (), output.event)
        near = [] if peer.presence is None else [flags(peer.presence.swarm)]
        ways = [*near, *(f"--initial-peers {address}" for address in peer.addresses)]
        lines = ["Others join with:", *(f"  {way}{how_to_unlock(peer)}" for way in ways)]
        output.panel(
            "ready", "Bootstrap peer is up", lines, maddrs=list(peer.addresses), peer_id=peer.peer_id.to_base58()
        )
        await stop.wait()
        await peer.stop()
        output.event("stopped", "Stopped.")

    run_until_stopped(run, output.error)


@app.command()
@takes_settings
def status(settings: Annotated[NodeSettings, Only("model", "initial_peers", *_FIND, "dht_prefix")], view: View) -> None:
    """Show who serves which blocks of MODEL, how fast, what is free, and where blocks are missing."""
    with importing():
        from swarm.commands.status import show, watch

    async def run(stop: asyncio.Event) -> None:
        _require_peers(settings.peer)
        peer, prefix = settings.peer, settings.dht_prefix
        overviews = watch(
            settings.model, peer.initial_peers, lan=peer.lan, key=peer.key, dht_prefix=prefix, interval=view.interval
        )
        await show(overviews, view, top=False, stop=stop)

    run_until_stopped(run, lambda text: print(f"Error: {text}", file=sys.stderr))


@app.command()
@takes_settings
def invite(options: Annotated[PeerOptions, Only("initial_peers", *_FIND)]) -> None:
    """Print an invitation: one line with addresses of the swarm and its key, for --join. Joins first, to be sure.

    Whoever has the line is in the swarm.
    """

    async def run(stop: asyncio.Event) -> None:
        with importing():
            from .commands.invite import invite as make

        _require_peers(options)
        print_secret((await make(options)).line())

    run_until_stopped(run, lambda text: print(f"Error: {text}", file=sys.stderr))


key = typer.Typer(no_args_is_help=True, help="Keys of locked swarms.")
app.add_typer(key, name="key")


@key.command("new")
@takes_settings
def new_key() -> None:
    """Print a new key: swarm-node key new > swarm.key. Who has it is in the swarm: keep it as you keep a password."""
    print_secret(SwarmKey.new().text())


def _require_peers(options: PeerOptions) -> None:
    if not options.initial_peers and not options.lan.wanted:
        raise UsageError(
            "say which swarm: --initial-peers MADDR, --join LINE for an invitation, or --lan for one on this network"
        )


def main() -> None:
    """Entry point of ``swarm-node``."""
    hide_invitation()
    set_waiting()  # before torch is imported
    run_command(app)
