"""Who answers in a terminal: a swarm that this process is a client of, or a gateway's HTTP API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from swarm.errors import ConnectError, RemoteError, UsageError

from .http import make_client
from .options import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model.facade import SwarmModelForCausalLM

Message = Mapping[str, str]
Show = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """A text and how it came about; ``route`` is for people to read."""

    text: str
    new_tokens: int
    tokens_per_second: float
    first_seconds: float
    seconds: float
    route: str


class Backend(Protocol):
    """Answers conversations. ``show`` gets the text as it comes; ``stop`` ends it early."""

    def chat(self, messages: Sequence[Message], *, max_tokens: int, show: Show, stop: threading.Event) -> Reply:
        """The assistant's next message.

        Raises:
            UsageError: the conversation has no room for an answer, or tokens that the model doesn't know.
        """

    def complete(self, prompt: str, *, max_tokens: int, show: Show) -> Reply:
        """The continuation of ``prompt``."""

    def forget(self) -> None:
        """The next conversation has nothing to do with the last."""

    def close(self) -> None:
        """Frees what it holds."""


class SwarmBackend:
    """Generates by the swarm's nodes. A conversation is one session, so that nothing is computed twice."""

    def __init__(
        self, model: SwarmModelForCausalLM, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, max_length: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
        self._options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            self._options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        if sampling.seed is not None:
            from transformers import set_seed

            set_seed(sampling.seed)
        self._session: Any = None
        self._ids: Any = None

    def chat(self, messages: Sequence[Message], *, max_tokens: int, show: Show, stop: threading.Event) -> Reply:
        """See :class:`Backend`."""
        ids = self._conversation(messages)
        self._check(ids)
        room = self._max_length - ids.shape[1] - 1
        if room < 1:
            raise UsageError(f"the conversation is full ({self._max_length} tokens): /reset starts anew")
        if self._session is None:
            self._session = self._model.session(max_length=self._max_length)
        options = {"max_new_tokens": min(max_tokens, room), "session": self._session, **self._options}
        reply, self._ids = self._generate(ids, show, stop, **options)
        return reply

    def complete(self, prompt: str, *, max_tokens: int, show: Show) -> Reply:
        """See :class:`Backend`."""
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise UsageError("the prompt is empty")
        self._check(ids)
        return self._generate(ids, show, None, max_new_tokens=max_tokens, **self._options)[0]

    def forget(self) -> None:
        """See :class:`Backend`."""
        session, self._session, self._ids = self._session, None, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """See :class:`Backend`."""
        self.forget()
        self._model.close()

    def _generate(self, ids: Any, show: Show, stop: threading.Event | None, **options: Any) -> tuple[Reply, Any]:
        from .terminal import describe_route, generate_text

        made = generate_text(self._model, self._tokenizer, ids, show=show, stop=stop, **options)
        route = describe_route(made.route)
        speed = made.tokens_per_second
        return Reply(made.text, made.new_tokens, speed, made.first_seconds, made.seconds, route), made.ids

    def _check(self, ids: Any) -> None:
        """Some tokenizers know special tokens that were added after the model was trained."""
        known, most = self._model.get_input_embeddings().weight.shape[0], int(ids.max())
        if most >= known:
            text = self._tokenizer.decode([most])
            raise UsageError(f"token ids of this model are below {known}: {most} ({text!r}) is none")

    def _conversation(self, messages: Sequence[Message]) -> Any:
        """Token ids ``[1, tokens]`` by the model's chat template; without one, the text just goes on."""
        import torch

        if self._tokenizer.chat_template:
            encoded: Any = self._tokenizer.apply_chat_template(
                list(map(dict, messages)), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            return encoded["input_ids"]
        fresh = self._ids is None
        text = "\n".join(message["content"] for message in (messages if fresh else messages[-1:]))
        new = self._tokenizer(text, return_tensors="pt", add_special_tokens=fresh)["input_ids"]
        return new if fresh else torch.cat([self._ids, new], dim=1)


class ApiBackend:
    """Asks a gateway, or anything else that speaks OpenAI's API."""

    def __init__(self, url: str, key: str | None, model: str | None, sampling: Sampling) -> None:
        self._http = make_client(url, key, httpx.Timeout(600.0, connect=10.0))
        self._model = model or self._only_model()
        self._options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:
            self._options["top_k"] = sampling.top_k
        if sampling.seed is not None:
            self._options["seed"] = sampling.seed

    @property
    def model(self) -> str:
        """The model that is asked."""
        return self._model

    def chat(self, messages: Sequence[Message], *, max_tokens: int, show: Show, stop: threading.Event) -> Reply:
        """See :class:`Backend`."""
        return self._stream("/v1/chat/completions", {"messages": [*messages]}, max_tokens, show, stop)

    def complete(self, prompt: str, *, max_tokens: int, show: Show) -> Reply:
        """See :class:`Backend`."""
        return self._stream("/v1/completions", {"prompt": prompt}, max_tokens, show, None)

    def forget(self) -> None:
        """Nothing is kept between requests."""

    def close(self) -> None:
        """See :class:`Backend`."""
        self._http.close()

    def _only_model(self) -> str:
        with self._answer("GET", "/v1/models") as answer:
            answer.read()
            try:  # a LoRA adapter has a parent
                names = [entry["id"] for entry in answer.json()["data"] if entry.get("parent") is None]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RemoteError(f"{answer.url.host} answers, but not as OpenAI's API does; check --api") from error
        if len(names) != 1:
            raise UsageError(f"say which MODEL: {answer.url.host} serves {', '.join(names) or 'none'}")
        return str(names[0])

    def _stream(
        self, path: str, fields: dict[str, Any], max_tokens: int, show: Show, stop: threading.Event | None
    ) -> Reply:
        body = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        body |= {"max_tokens": max_tokens, **self._options, **fields}
        begin = time.perf_counter()
        parts: list[str] = []
        first: float | None = None
        tokens = 0
        with self._answer("POST", path, json=body) as answer:
            for event in events_of(answer.iter_lines()):
                if "error" in event:
                    raise RemoteError(str(event["error"].get("message", event["error"])))
                text = "".join(_text_of(choice) for choice in event.get("choices", ()))
                if text:
                    first = first or time.perf_counter()
                    parts.append(text)
                    show(text)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if stop is not None and stop.is_set():
                    tokens = tokens or len(parts)
                    break  # leaving the block hangs up, and the gateway frees the session
        show("\n")
        end = time.perf_counter()
        first = first or end
        speed = (tokens - 1) / (end - first) if tokens > 1 and end > first else tokens / max(end - begin, 1e-9)
        route = answer.headers.get("x-swarm-route", "unknown")
        return Reply("".join(parts), tokens, speed, first - begin, end - begin, route)

    @contextmanager
    def _answer(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **options) as answer:
                if answer.is_error:
                    answer.read()
                    raise RemoteError(_error_text(answer))
                yield answer
        except httpx.HTTPError as error:
            raise ConnectError(
                f"can't reach the API at {self._http.base_url}: {error or type(error).__name__}; check --api"
            ) from error


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to ``[DONE]``.

    Raises:
        RemoteError: an event is no JSON object.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RemoteError("the API answered with an event that is not JSON") from error
        if not isinstance(event, dict):
            raise RemoteError("the API answered with an event that is no object")
        yield event


def _text_of(choice: Mapping[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API answered {answer.status_code} {answer.reason_phrase}"
