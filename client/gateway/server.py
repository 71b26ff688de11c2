"""The gateway's process: joins the swarm, loads the ends of its models, and serves HTTP until it is told to stop."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llguidance  # noqa: F401  # what is missing of the extra is to be known at once
import starlette  # noqa: F401
import uvicorn

from swarm.compat.late_imports import importing
from swarm.errors import ConnectError, UsageError

from ..commands.local_swarm import LocalNode, LocalSwarm
from .access.access import LOOPBACK, Access
from .access.connections import BoundedProtocol
from .access.key_desk import KeyDesk
from .access.keys import KeyStore
from .decode.admission import Admission
from .event_log import EventLog
from .metrics import Metrics
from .settings import GatewaySettings

if TYPE_CHECKING:
    from swarm.network.peer import Peer

    from .served_model import ServedModel
    from .swarm_watch import SwarmWatch

_STOP_SECONDS = 5


def access_for(settings: GatewaySettings) -> Access:
    """Keys are asked for everywhere but on loopback.

    Raises:
        UsageError: they are asked for, and there are none.
    """
    loopback = settings.host in LOOPBACK
    if settings.no_auth or loopback:
        return Access(None, LOOPBACK if loopback else None, settings.cors_origins)
    keys = KeyStore(settings.keys_file)
    if not keys.list():
        keys.close()
        raise UsageError(
            f"{settings.host} can be reached from other machines, and there are no API keys: make one with "
            "swarm gateway keys add NAME, or let everybody in with --no-auth"
        )
    return Access(KeyDesk(keys), None, settings.cors_origins)


def run(settings: GatewaySettings) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        UsageError, SwarmError: as :func:`running`.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        # while it starts there is much that may be waited for, and an exception ends all of it
        signal.signal(number, signal.default_int_handler)
    log = EventLog(sys.stdout.fileno())
    with running(settings, log) as gateway:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        page = gateway.url.removesuffix("/v1")
        print(f"Open {page} in a browser; programs take {gateway.url}. Ctrl-C ends.", file=sys.stderr, flush=True)
        log({"event": "ready", "url": gateway.url, "models": gateway.models})
        while not stop.wait(0.2) and not gateway.serving.done():
            pass
    log({"event": "stopped"})
    log.close()


@dataclass(frozen=True)
class Running:
    """A gateway that is up. ``url`` is the API's base URL, ``serving`` ends when the server does."""

    url: str
    models: list[str]
    serving: Future[None]


@contextmanager
def running(settings: GatewaySettings, log: Callable[[dict[str, Any]], None]) -> Iterator[Running]:
    """A gateway for as long as the ``with`` is open, in this process's client runtime.

    Args:
        log: gets the fields of each request.

    Raises:
        UsageError: what was asked for can't be done; the message says what to do.
        SwarmError: the swarm can't be reached, any longer or at all, or a node of the local one did not start.
    """
    access = access_for(settings)
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(settings.host, settings.port))
        finish_swarm = _start_swarm(settings, stack) if settings.local else None
        # Takes seconds, in which the first node of a local swarm starts.
        from ..runtime import Runtime
        from .app import Gateway, make_app
        from .swarm_watch import SwarmWatch

        peers = _find_swarm(settings) if finish_swarm is None else finish_swarm()
        _join(settings, tuple(peers), stack)
        admission = Admission(settings.max_sessions, settings.max_queue)
        metrics = Metrics(admission)
        models = {model.id: model for model in _load(settings, peers, admission, metrics, stack)}
        peer = next(iter(models.values())).peer  # all have the same
        metrics.watch(peer)
        watch = SwarmWatch(models, peers, settings.key.keys(), shows_key=access.keys is not None)
        gateway = Gateway(models, watch, metrics, access, log, log_prompts=settings.log_prompts)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(gateway),
                http=BoundedProtocol,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        serving = Runtime.get().start(_serve(server, listening, models.values(), watch, peer, access.keys))
        address, port = listening.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        try:
            yield Running(f"http://{host}:{port}/v1", list(models), serving)
        finally:
            Runtime.get().run(watch.stop())  # or open pages would hold it up
            server.should_exit = True
            serving.result()


def _join(settings: GatewaySettings, peers: tuple[str, ...], stack: ExitStack) -> None:
    """Joins before the models do, which share the peer: by those met in an earlier run if the initial ones are gone."""
    from ..runtime import Runtime
    from ..settings import ClientSettings

    runtime = Runtime.get()
    known = None if settings.local else settings.keys_file.with_suffix(".peers")
    runtime.run(runtime.join(peers, startup_timeout=ClientSettings.startup_timeout, known_peers=known))
    stack.callback(lambda: runtime.run(runtime.leave(peers)))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise ConnectError(f"can't listen on {host} port {port} ({error.strerror}): choose another --port") from error
    return listening


def _start_swarm(settings: GatewaySettings, stack: ExitStack) -> Callable[[], tuple[str, ...]]:
    """Starts the first node; the rest by the function returned, which waits for all and gives the initial peers."""
    from swarm.model.source import resolve

    (name,) = settings.models
    blocks = resolve(name).num_blocks
    count = min(settings.local_nodes, blocks)
    edges = [blocks * number // count for number in range(count + 1)]
    workdir = stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-gateway-"))
    swarm = stack.enter_context(LocalSwarm(name, Path(workdir)))
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(edges)]
    print(f"Starting a private swarm of {count} nodes on this machine…", file=sys.stderr, flush=True)
    first = swarm.start(spans[0], name="node-1")

    def finish() -> tuple[str, ...]:
        swarm.wait([first])
        others: list[LocalNode] = []
        for number, span in enumerate(spans[1:], start=2):
            others.append(swarm.start(span, name=f"node-{number}"))
        swarm.wait(others)
        return tuple(swarm.peers)

    return finish


def _find_swarm(settings: GatewaySettings) -> tuple[str, ...]:
    from ..model.find_swarm import find_swarm

    lan = settings.lan.lan_name or settings.lan.lan
    return find_swarm(tuple(settings.initial_peers), lan, settings.models, settings.dht_prefix, settings.key)


def _load(
    settings: GatewaySettings,
    peers: Sequence[str],
    admission: Admission,
    metrics: Metrics,
    stack: ExitStack,
) -> list[ServedModel]:
    with importing():
        from ..model.facade import SwarmModelForCausalLM
        from ..model.tokenizer import load_tokenizer
        from .served_model import ServedModel

    models = []
    for name in settings.models:
        facade = SwarmModelForCausalLM.from_pretrained(
            name,
            initial_peers=peers,
            swarm_key=settings.key.keys(),
            dht_prefix=settings.dht_prefix,
            wait_timeout=settings.wait_timeout,
            **asdict(settings.ends),
        )
        stack.callback(facade.close)
        tokenizer = load_tokenizer(facade, name)
        models.append(ServedModel(name, facade, tokenizer, admission, metrics.batch_rows.observe))
    if len({model.id for model in models}) < len(models):
        raise UsageError("two of the models have the same name")
    return models


async def _serve(
    server: uvicorn.Server,
    listening: socket.socket,
    models: Iterable[ServedModel],
    watch: SwarmWatch,
    peer: Peer,
    keys: KeyDesk | None,
) -> None:
    watch.start()
    for model in models:
        model.engine.start()
    daemon = asyncio.ensure_future(peer.watch_daemon())
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        await asyncio.wait({daemon, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        if daemon.done():
            daemon.result()
    finally:
        daemon.cancel()
        await asyncio.gather(*(model.engine.stop() for model in models))
        if keys is not None:
            await keys.close()
