"""The command ``swarm``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.builder import takes_settings
from swarm.commands.hidden import hide_invitation
from swarm.commands.options import CONTEXT, View
from swarm.commands.terminal import require_text, run, text_input
from swarm.compat.late_imports import importing
from swarm.errors import UsageError
from swarm.option import Only, Option

from .commands.errors import errors
from .commands.options import Ends, Looking, MaxNewTokens, Sampling, Where
from .gateway.cli import gateway

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

_CHAT_SAMPLING = Sampling(temperature=0.7, top_p=0.9)
_TOP_VIEW = View(interval=1.0)


@app.command()
@takes_settings
@errors()
def generate(
    *,
    prompt: Annotated[str | None, Option("Text to continue; default: from stdin.", flags=("--prompt", "-p"))] = None,
    where: Where,
    max_new_tokens: MaxNewTokens = 64,
    sampling: Sampling,
    ends: Ends,
    as_json: Annotated[bool, Option("Print one JSON object with text, speed and route.", flags=("--json",))] = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes; speed and route go to stderr."""
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError('give a text to continue: --prompt "…", or pipe it in')
        prompt = require_text(text_input().read(), "the text from stdin")
    with _backend(where, ends, sampling) as backend:
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
@takes_settings
@errors()
def chat(
    *,
    where: Where,
    system: Annotated[str | None, Option("What the model is told before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    max_length: Annotated[int, Option("Tokens that the conversation may have in all.", min=16)] = 2048,
    sampling: Sampling = _CHAT_SAMPLING,
    ends: Ends,
) -> None:
    """Talk to the model. /help lists the commands; /exit or Ctrl-D ends."""
    with _backend(where, ends, sampling, max_length=max_length) as backend:
        from .commands.talk import Talk, make_reader

        print(f"Talking to {where.model or where.api}. /help lists the commands, /exit ends.", file=sys.stderr)
        Talk(backend, max_tokens=max_new_tokens, system=system).run(make_reader())


@app.command()
@takes_settings
@errors()
def status(where: Looking, view: View) -> None:
    """Show who serves which blocks of MODEL, what is free, and where blocks are missing."""
    _watch(where, view, top=False)


@app.command()
@takes_settings
@errors()
def top(where: Looking, view: Annotated[View, Only("interval")] = _TOP_VIEW) -> None:
    """Show live what each node does: tokens a second, sessions, queue, KV cache. Ctrl-C ends."""
    _watch(where, view, top=True)


@app.command("list")
@takes_settings
@errors()
def list_swarms(
    as_json: Annotated[bool, Option("Print one JSON object.", flags=("--json",))] = False,
    seconds: Annotated[float, Option("How long to listen.", min=0.1)] = 2.0,
) -> None:
    """Show which swarms there are on this network: their names, models, nodes and addresses."""
    import asyncio

    with importing():
        from swarm.commands.lan_list import show_swarms

    asyncio.run(show_swarms(seconds, as_json=as_json))


app.add_typer(gateway, name="gateway")


@contextmanager
def _backend(where: Where, ends: Ends, sampling: Sampling, *, max_length: int = 2**31) -> Iterator[Backend]:
    where.require()
    from .commands.backends import ApiBackend, SwarmBackend

    made: Backend
    if where.api is not None:
        # a gateway serves adapters as models of their own
        made = ApiBackend(where.api, where.api_key, where.client.active_adapter or where.model, sampling)
    else:
        made = SwarmBackend(*_load(where, ends), sampling, max_length)
    try:
        yield made
    finally:
        made.close()


def _load(where: Where, ends: Ends) -> tuple[SwarmModelForCausalLM, PreTrainedTokenizerBase]:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with importing():
        from .model.facade import SwarmModelForCausalLM
        from .model.tokenizer import load_tokenizer

    assert where.model is not None
    facade = SwarmModelForCausalLM.from_pretrained(
        where.model,
        initial_peers=where.initial_peers,
        lan=where.lan.lan_name or where.lan.lan,
        swarm_key=where.key.keys(),
        dht_prefix=where.dht_prefix,
        **asdict(ends),
        **asdict(where.client),
    )
    try:
        return facade, load_tokenizer(facade, where.model)
    except UsageError:
        facade.close()
        raise


def _watch(where: Where, view: View, *, top: bool) -> None:
    where.require()
    import asyncio

    with importing():
        from swarm.commands.status import show, watch

    from .commands.gateway_view import watch_gateway

    async def run() -> None:
        if where.api is not None:
            overviews = watch_gateway(where.api, where.api_key, where.model, interval=view.interval)
        else:
            assert where.model is not None
            lan, prefix, peers = where.lan, where.dht_prefix, where.initial_peers
            overviews = watch(where.model, peers, lan=lan, key=where.key, dht_prefix=prefix, interval=view.interval)
        await show(overviews, view, top=top, stop=asyncio.Event())

    asyncio.run(run())


def _nowhere(text: str) -> None:
    """For output that nobody is to see."""


def main() -> None:
    """Entry point of ``swarm``."""
    hide_invitation()
    run(app)
