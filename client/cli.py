"""The command ``swarm``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.options import CONTEXT, NETWORK, WEIGHTS, CacheDir, DhtPrefix, InitialPeers, Manifest, split_list
from swarm.commands.terminal import Failure, explain, require_text, run, tell, text_input
from swarm.compat.late_imports import defer_imports, importing
from swarm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .commands.backends import Backend
    from .model.facade import SwarmModelForCausalLM

app = typer.Typer(
    name="swarm",
    help="Generate text with a model that a swarm serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

_SAMPLING = "Sampling"

WaitTimeout = Annotated[
    float,
    typer.Option(
        envvar="SWARM_WAIT_TIMEOUT", min=0, help="Seconds to wait for blocks nobody serves.", rich_help_panel=NETWORK
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="0 takes the likeliest token every time.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Sample from this share of the mass.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0: all.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        envvar="SWARM_MODEL",
        help="A directory, a Hugging Face Hub id, or demo, the built-in model. With --api, a name that it knows.",
    ),
]
Api = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_API",
        metavar="URL",
        help="Ask a gateway (or another server with OpenAI's API) instead of joining the swarm.",
        rich_help_panel=NETWORK,
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="SWARM_API_KEY", help="Key for --api, if it wants one.", rich_help_panel=NETWORK)
]
Weights = Annotated[
    str,
    typer.Option(
        envvar="SWARM_WEIGHTS",
        metavar="hub|peers|auto",
        help="Where embeddings, head, config and tokenizer come from. hub: a directory here, or else the Hub. peers: "
        "nodes that hand weights out; MODEL is then its name in the swarm. auto: a directory here, else peers, else "
        "the Hub.",
        rich_help_panel=WEIGHTS,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_ADAPTER",
        metavar="NAME",
        help="LoRA adapter to use, by its name in the swarm (swarm-node serve … --adapters).",
    ),
]
Interval = Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")]


@app.command()
def generate(
    model: OptionalModel = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; default: from stdin.")] = None,
    initial_peers: InitialPeers = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dht_prefix: DhtPrefix = None,
    wait_timeout: WaitTimeout = 60.0,
    weights: Weights = "hub",
    manifest: Manifest = None,
    cache_dir: CacheDir = None,
    api: Api = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, speed and route.")] = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes; speed and route go to stderr."""
    with errors():
        if prompt is None:
            if sys.stdin.isatty():
                raise UsageError('give a text to continue: --prompt "…", or pipe it in')
            prompt = require_text(text_input().read(), "the text from stdin")
        where = _Where(model, split_list(initial_peers), dht_prefix, wait_timeout, api, api_key, adapter)
        ends = _Ends(weights, manifest, cache_dir)
        with _backend(where, ends, (temperature, top_p, top_k, seed)) as backend:
            from .commands.terminal import describe_speed, print_now

            if not as_json:
                print_now(prompt)
            show = _nowhere if as_json else print_now
            made = backend.complete(prompt, max_tokens=max_new_tokens, show=show)
            if as_json:
                print(json.dumps({"prompt": prompt, **asdict(made)}))
            else:
                speed = describe_speed(made.new_tokens, made.tokens_per_second, made.first_seconds, made.route)
                print(speed, file=sys.stderr)


@app.command()
def chat(
    model: OptionalModel = None,
    initial_peers: InitialPeers = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    max_length: Annotated[int, typer.Option(min=16, help="Tokens that the conversation may have in all.")] = 2048,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    dht_prefix: DhtPrefix = None,
    wait_timeout: WaitTimeout = 60.0,
    weights: Weights = "hub",
    manifest: Manifest = None,
    cache_dir: CacheDir = None,
    api: Api = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to the model. /help lists the commands; /exit or Ctrl-D ends."""
    with errors():
        where = _Where(model, split_list(initial_peers), dht_prefix, wait_timeout, api, api_key, adapter)
        ends = _Ends(weights, manifest, cache_dir)
        with _backend(where, ends, (temperature, top_p, top_k, seed), max_length=max_length) as backend:
            from .commands.talk import Talk, make_reader

            print(f"Talking to {model or api}. /help lists the commands, /exit ends.", file=sys.stderr)
            Talk(backend, max_tokens=max_new_tokens, system=system).run(make_reader())


@app.command()
def status(
    model: OptionalModel = None,
    initial_peers: InitialPeers = None,
    dht_prefix: DhtPrefix = None,
    api: Api = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and exit.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    interval: Interval = 2.0,
) -> None:
    """Show who serves which blocks of MODEL, what is free, and where blocks are missing."""
    with errors():
        where = _Where(model, split_list(initial_peers), dht_prefix, 0.0, api, api_key)
        _watch(where, interval, as_json=as_json, once=once, top=False)


@app.command()
def top(
    model: OptionalModel = None,
    initial_peers: InitialPeers = None,
    dht_prefix: DhtPrefix = None,
    api: Api = None,
    api_key: ApiKey = None,
    interval: Interval = 1.0,
) -> None:
    """Show live what each node does: tokens a second, sessions, queue, KV cache. Ctrl-C ends."""
    with errors():
        where = _Where(model, split_list(initial_peers), dht_prefix, 0.0, api, api_key)
        _watch(where, interval, as_json=False, once=False, top=True)


@dataclass(frozen=True)
class _Where:
    """Which model, and where it is: in a swarm, or behind a gateway."""

    model: str | None
    peers: tuple[str, ...]
    dht_prefix: str | None
    wait_timeout: float
    api: str | None
    api_key: str | None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.api is None and self.model is None:
            raise UsageError("say which MODEL, a directory or a Hub id, or where a gateway is: --api URL")
        if self.api is None and not self.peers:
            raise UsageError(
                "say which swarm: --initial-peers MADDR, as printed by swarm-node serve, or a gateway: --api URL"
            )
        if self.api is not None and self.peers:
            raise UsageError("--api and --initial-peers can't be given together: a gateway knows its swarm")


@dataclass(frozen=True)
class _Ends:
    """Where the ends of the model come from."""

    weights: str
    manifest: str | None
    cache_dir: Path | None


@contextmanager
def _backend(
    where: _Where, ends: _Ends, sampling: tuple[float, float, int, int | None], *, max_length: int = 2**31
) -> Iterator[Backend]:
    from .commands.backends import ApiBackend, Sampling, SwarmBackend

    made: Backend
    if where.api is not None:
        # a gateway serves adapters as models of their own
        made = ApiBackend(where.api, where.api_key, where.adapter or where.model, Sampling(*sampling))
    else:
        made = SwarmBackend(*_load(where, ends), Sampling(*sampling), max_length)
    try:
        yield made
    finally:
        made.close()


def _load(where: _Where, ends: _Ends) -> tuple[SwarmModelForCausalLM, PreTrainedTokenizerBase]:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with importing():
        from .model.facade import SwarmModelForCausalLM
        from .model.tokenizer import load_tokenizer

    assert where.model is not None
    facade = SwarmModelForCausalLM.from_pretrained(
        where.model,
        initial_peers=where.peers,
        dht_prefix=where.dht_prefix,
        wait_timeout=where.wait_timeout,
        **asdict(ends),
        active_adapter=where.adapter,
    )
    try:
        return facade, load_tokenizer(facade, where.model)
    except UsageError:
        facade.close()
        raise


def _watch(where: _Where, interval: float, *, as_json: bool, once: bool, top: bool) -> None:
    import asyncio

    from swarm.commands.status import show, watch

    from .commands.gateway_view import watch_gateway

    async def run() -> None:
        if where.api is not None:
            overviews = watch_gateway(where.api, where.api_key, where.model, interval=interval)
        else:
            assert where.model is not None
            overviews = watch(where.model, where.peers, dht_prefix=where.dht_prefix, interval=interval)
        await show(overviews, as_json=as_json, once=once, top=top, stop=asyncio.Event())

    asyncio.run(run())


def _nowhere(text: str) -> None:
    """For output that nobody is to see."""


@contextmanager
def errors() -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 2; others of the swarm, one line and 1."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        failure = explain(error) or (Failure(str(error), 2) if isinstance(error, ValueError) else None)
        if failure is None:
            raise
        raise typer.Exit(tell(failure)) from None


def main() -> None:
    """Entry point of ``swarm``."""
    defer_imports()
    from .gateway.cli import gateway  # takes its options' types from here

    app.add_typer(gateway, name="gateway")
    run(app)
