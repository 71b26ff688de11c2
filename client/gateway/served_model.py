"""A model that the gateway serves: its engine, its tokenizer, and what it says of itself."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swarm.network.overview import Overview
from swarm.network.peer import Peer

from ..ends.model_ends import ModelEnds
from .decode.admission import Admission
from .decode.engine import GatewayEngine
from .decode.sampling import SamplingParams
from .errors import invalid
from .text.grammar import GrammarFactory

T = TypeVar("T")
_CHARS_A_TOKEN, _SPARE_CHARS = 64, 2**16


class ServedModel:
    """Made over a loaded facade and its tokenizer.

    Attributes:
        id: its name in the API: MODEL as typed, a directory by its own name; with a LoRA adapter, the adapter's name.
        name: MODEL as typed.
        adapter: the LoRA adapter that its texts go through, if any.
        eos: tokens that end a text.
        defaults: sampling options of the model's ``generation_config.json``; OpenAI's where it has none.
    """

    def __init__(
        self, name: str, facade: Any, tokenizer: Any, admission: Admission, on_batch: Callable[[int], None]
    ) -> None:
        self.id = Path(name).name if Path(name).expanduser().is_dir() else name
        self.name = name
        self.adapter: str | None = None
        self._base: str | None = None
        self._with_adapters: dict[str, ServedModel] = {}
        self.created = int(time.time())
        self.tokenizer = tokenizer
        self._facade = facade
        self._text = ThreadPoolExecutor(1, thread_name_prefix="gateway-text")
        self._grammars: GrammarFactory | None = None
        self._grammars_lock = threading.Lock()
        self.vocabulary = facade.config.vocab_size
        self.eos = _eos_of(facade, tokenizer)
        self.defaults = _defaults_of(facade.generation_config)
        self.engine = GatewayEngine(ModelEnds(facade), facade._connection, admission, on_batch)

    def adapters(self) -> list[ServedModel]:
        """The model with each of the LoRA adapters that the swarm serves all of it with now."""
        return [self._with(name) for name in self._facade._connection.adapters()]

    def _with(self, adapter: str) -> ServedModel:
        if adapter not in self._with_adapters:
            made = self._with_adapters[adapter] = copy.copy(self)
            made.id = made.adapter = adapter
            made._base = self.id
        return self._with_adapters[adapter]

    @property
    def peer(self) -> Peer:
        """The gateway in the swarm, which models may share."""
        return self._facade._connection.peer  # type: ignore[no-any-return]

    @property
    def grammars(self) -> GrammarFactory:
        """Makes grammars for this tokenizer; the first call takes about a second."""
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = GrammarFactory(self.tokenizer, self.vocabulary, self.eos)
            return self._grammars

    async def in_thread(self, work: partial[T]) -> T:
        """Runs work on text, in one thread: tokenizers are not made for several at once."""
        return await asyncio.get_running_loop().run_in_executor(self._text, work)

    def check_size(self, size: int, param: str) -> None:
        """Refuses at once what is far too long, since to make tokens of it takes long, and holds up others.

        Raises:
            ApiError: no tokenizer would make so few tokens of so many characters or bytes that there is room for them.
        """
        limit = self._facade._connection.longest_session()
        if limit is not None and size > _SPARE_CHARS + _CHARS_A_TOKEN * limit:
            raise invalid(
                f"This model's maximum context length is {limit} tokens. However, your request has {size} characters. "
                "Please reduce its length.",
                param,
                "context_length_exceeded",
            )

    async def encode(self, text: str, param: str = "prompt") -> tuple[int, ...]:
        """Token ids of ``text``, with the special tokens that the tokenizer puts in front.

        Raises:
            ApiError: as :meth:`check_size`.
        """
        self.check_size(len(text), param)
        encoded = await self.in_thread(partial(self.tokenizer, text))
        return tuple(encoded["input_ids"])

    def token_text(self, token: int) -> str:
        """A token by itself."""
        text: str = self.tokenizer.decode([token])
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters."""
        return self.grammars.token_bytes(token)

    async def prompts(self, given: str | list[Any], param: str) -> list[tuple[int, ...]]:
        """The prompts of a request: text, texts, token ids, or lists of them.

        Raises:
            ApiError: one of them is empty, or has tokens that the model doesn't know.
        """
        many: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        prompts = [await self.encode(each, param) if isinstance(each, str) else tuple(each) for each in many]
        if not prompts or not all(prompts):
            raise invalid(f"{param} is empty", param)
        return [self.known(prompt, param) for prompt in prompts]

    def known(self, tokens: tuple[int, ...], param: str) -> tuple[int, ...]:
        """``tokens``, all of which the model knows. Some tokenizers have more: special tokens that were added later.

        Raises:
            ApiError: it doesn't.
        """
        if (most := max(tokens)) >= self.vocabulary:
            text = f" ({self.token_text(most)!r})" if most < len(self.tokenizer) else ""
            raise invalid(f"token ids of this model are below {self.vocabulary}: {most}{text} is none", param)
        return tokens

    def room(self, prompt: tuple[int, ...], max_tokens: int | None, param: str) -> int:
        """How many tokens to generate at most.

        Raises:
            ApiError: the model, or the nodes that serve it, can't hold so many.
        """
        limit = self._facade._connection.longest_session()
        if limit is None:
            return 2048 if max_tokens is None else max_tokens
        least = 1 if max_tokens is None else max_tokens
        wanted = len(prompt) + least
        if wanted > limit:
            raise invalid(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted} tokens "
                f"({len(prompt)} in the prompt, {least} in the completion). Please reduce the length of the "
                "prompt or completion.",
                param,
                "context_length_exceeded",
            )
        return limit - len(prompt) if max_tokens is None else max_tokens

    async def overview(self, before: Overview | None) -> Overview:
        """The swarm that serves it, nodes asked themselves; rates are since ``before``."""
        return await self._facade._connection.overview(self.id, before)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """For ``/v1/models``. As in vLLM, ``parent`` is the base model of an adapter."""
        parent = {} if self._base is None else {"parent": self._base}
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "swarm",
            "max_model_len": self._facade._connection.longest_session(),
            **parent,
        }


def _eos_of(facade: Any, tokenizer: Any) -> frozenset[int]:
    eos = facade.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)


def _defaults_of(config: Any) -> SamplingParams:
    """transformers' names and ours are the same."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(config, name, None) for name in names} if config.do_sample else {}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
