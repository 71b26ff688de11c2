"""A gateway before two real nodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client.gateway.server import GatewaySettings, running
from swarm.model.source import resolve
from tests.adapters import make_adapter, whole_with
from tests.swarm_e2e.nodes import Swarm, run_swarm

CACHE_TOKENS = 4096


@dataclass
class Api:
    """A gateway, and clients of it."""

    url: str
    settings: GatewaySettings
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own, which tries nothing twice."""
        return openai.OpenAI(base_url=self.url, api_key="unused", max_retries=0)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A plain request."""
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """A request to a path beside ``/v1``."""
        return httpx.get(self.url.removesuffix("/v1") + path, headers=headers)


def ask(content: str) -> Any:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


@functools.cache
def demo_adapter() -> Path:
    """A LoRA adapter for the demo model."""
    return make_adapter(resolve("demo").path, "painter", r=4, target_modules=["q_proj", "v_proj", "up_proj"])


@pytest.fixture(scope="session")
def swarm() -> Iterator[Swarm]:
    adapters = ("--adapters", str(demo_adapter()))
    with run_swarm("demo", ("0:4", "4:8"), "--cache-tokens", str(CACHE_TOKENS), *adapters, metrics=True) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def settings(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory) -> GatewaySettings:
    return GatewaySettings(
        models=("demo",),
        initial_peers=tuple(swarm.initial_peers),
        host="127.0.0.1",
        port=0,
        keys_file=tmp_path_factory.mktemp("gateway") / "keys.sqlite",
        max_sessions=64,
        max_queue=64,
    )


@pytest.fixture(scope="session")
def api(settings: GatewaySettings) -> Iterator[Api]:
    log: list[dict[str, Any]] = []
    with running(settings, log.append) as gateway:
        yield Api(gateway.url, settings, log)


@pytest.fixture
def small(settings: GatewaySettings) -> Iterator[Api]:
    """Another gateway to the same swarm, for two sessions and one that waits."""
    log: list[dict[str, Any]] = []
    with running(replace(settings, max_sessions=2, max_queue=1), log.append) as gateway:
        yield Api(gateway.url, settings, log)


class Whole:
    """The whole model in this process: what is right."""

    def __init__(self) -> None:
        path: Path = resolve("demo").path
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def greedy(self, text: str, tokens: int, **options: Any) -> str:
        """The continuation by transformers' generate."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        made = self.model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, **options)
        continuation: str = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return continuation

    def adapted(self) -> Whole:
        """The same with the adapter, in PEFT."""
        other = copy.copy(self)
        other.model = whole_with(resolve("demo").path, {"painter": demo_adapter()})
        return other

    def chat_prompt(self, content: str) -> str:
        """What the model's template makes of one message, without the token that the tokenizer adds again."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text.removeprefix(self.tokenizer.bos_token)


@pytest.fixture(scope="session")
def whole() -> Whole:
    return Whole()
