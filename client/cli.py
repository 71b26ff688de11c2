"""The command ``swarm``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import BadRequestError, SwarmError, UsageError
from swarm.options import CONTEXT, NETWORK, DhtPrefix, InitialPeers, Model, split_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm.client.model import SwarmModelForCausalLM

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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; default: from stdin.")] = None,
    initial_peers: InitialPeers = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dht_prefix: DhtPrefix = None,
    wait_timeout: WaitTimeout = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, speed and route.")] = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes; speed and route go to stderr."""
    with errors():
        if prompt is None:
            if sys.stdin.isatty():
                raise UsageError('give a text to continue: --prompt "…", or pipe it in')
            prompt = sys.stdin.read()
        model_, tokenizer = _load(model, initial_peers, dht_prefix, wait_timeout)
        with model_:
            from swarm.client.terminal import generate_text

            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            if ids.shape[1] == 0:
                raise UsageError("the prompt is empty")
            if not as_json:
                print(prompt, end="", flush=True)
            options = _sampling(temperature, top_p, top_k, seed)
            made = generate_text(model_, tokenizer, ids, show=not as_json, max_new_tokens=max_new_tokens, **options)
            if as_json:
                fields = {
                    "prompt": prompt,
                    "text": made.text,
                    "new_tokens": made.new_tokens,
                    "seconds": made.seconds,
                    "first_token_seconds": made.first_seconds,
                    "tokens_per_second": made.tokens_per_second,
                    "route": [[hop.peer_id.to_base58(), hop.start, hop.end] for hop in made.route],
                }
                print(json.dumps(fields))
            else:
                print(made.describe(), file=sys.stderr)


@app.command()
def chat(
    model: Model,
    initial_peers: InitialPeers = None,
    max_new_tokens: MaxNewTokens = 256,
    max_length: Annotated[int, typer.Option(min=16, help="Tokens that the conversation may have in all.")] = 2048,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    dht_prefix: DhtPrefix = None,
    wait_timeout: WaitTimeout = 60.0,
) -> None:
    """Talk to the model. An empty line, /exit or Ctrl-D ends; /reset forgets the conversation."""
    with errors():
        model_, tokenizer = _load(model, initial_peers, dht_prefix, wait_timeout)
        options = _sampling(temperature, top_p, top_k, seed)
        limit = min(max_length, getattr(model_.config, "max_position_embeddings", max_length))
        with model_:
            print(f"Talking to {model}. /reset starts anew, /exit ends.", file=sys.stderr)
            while _converse(model_, tokenizer, limit, max_new_tokens, options):
                print("Forgotten.", file=sys.stderr)


def _converse(
    model: SwarmModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> bool:
    """One conversation, in one session; whether another one is wanted."""
    import torch

    from swarm.client.terminal import generate_text

    messages: list[dict[str, str]] = []
    ids = torch.empty(1, 0, dtype=torch.int64)
    with model.session(max_length=max_length):
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return False
            if line.strip() in ("/exit", "/quit", ""):
                return False
            if line.strip() == "/reset":
                return True
            messages.append({"role": "user", "content": line})
            ids = _conversation_ids(tokenizer, messages, ids)
            room = max_length - ids.shape[1] - 1
            if room < 1:
                print("The conversation is full: /reset starts anew.", file=sys.stderr)
                messages.pop()
                continue
            made = generate_text(model, tokenizer, ids, max_new_tokens=min(max_new_tokens, room), **options)
            messages.append({"role": "assistant", "content": made.text})
            ids = made.ids
            print(f"[{made.describe()}]", file=sys.stderr)


def _conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], before: Any) -> Any:
    """Token ids of the conversation, by the model's chat template; without one, the text just goes on."""
    import torch

    if tokenizer.chat_template:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]
    new = tokenizer(messages[-1]["content"], return_tensors="pt", add_special_tokens=before.shape[1] == 0)["input_ids"]
    return torch.cat([before, new], dim=1)


def _load(
    model: str, initial_peers: list[str] | None, dht_prefix: str | None, wait_timeout: float
) -> tuple[SwarmModelForCausalLM, PreTrainedTokenizerBase]:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    peers = split_list(initial_peers)
    if not peers:
        raise UsageError("say which swarm: --initial-peers MADDR, as printed by swarm-node serve")
    from transformers import AutoTokenizer

    from swarm.client.model import SwarmModelForCausalLM
    from swarm.source import resolve

    facade = SwarmModelForCausalLM.from_pretrained(
        model, initial_peers=peers, dht_prefix=dht_prefix, wait_timeout=wait_timeout
    )
    source = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=source.is_local)
    except (OSError, ValueError) as error:
        facade.close()
        raise UsageError(f"{model} has no tokenizer that can be loaded: {error}") from error
    return facade, tokenizer


def _sampling(temperature: float, top_p: float, top_k: int, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


@contextmanager
def errors() -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 2; others of the swarm, one line and 1."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (SwarmError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        theirs = isinstance(error, (UsageError, BadRequestError, ValueError))
        raise typer.Exit(2 if theirs else 1) from None


def main() -> None:
    """Entry point of ``swarm``."""
    from swarm.client.gateway.cli import gateway  # takes its options' types from here

    app.add_typer(gateway, name="gateway")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for nodes on this machine; see swarm-node
    app()
