"""Requests of OpenAI's API, as far as they mean something here. Fields that aren't known are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, field_validator

from ..decode.sampling import SamplingParams
from .kinds import ID_LISTS, IDS, OBJECT, OBJECTS, TEXT, TEXTS, one_of

MAX_STOPS, MAX_PROMPTS = 4, 2048  # OpenAI's
_MAX_BIASES = 1024
_COLDEST = 1e-5
"""Temperatures below are 0: divided by them, logits would be too large for float32."""
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Prompts = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag(TEXTS)]
    | Annotated[Tokens, Tag(IDS)]
    | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag(ID_LISTS)],
    one_of("a string, a list of strings, a list of token ids, or a list of such lists"),
]
"""Texts, as such or as token ids, one or many. Lists are read up to their first error: there may be millions in one."""


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > _MAX_BIASES:
        raise ValueError(f"has to have at most {_MAX_BIASES} entries")
    return biases


Biases = Annotated[
    dict[Token, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=_MAX_BIASES), BeforeValidator(_few)
]
"""Of tokens. Counted before they are read, as each that is wrong is an error."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(_Request):
    """What a stream has besides text."""

    include_usage: bool = False


class Sampling(_Request):
    """Options that chat and completions share."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: (
        Annotated[
            Annotated[str, Tag(TEXT)] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), Tag(TEXTS)],
            one_of("a string or a list of strings"),
        ]
        | None
    ) = None
    max_tokens: Count | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The sampler's options; those not given are the model's own ``defaults``."""

        def chosen(name: str) -> Any:
            given = getattr(self, name)
            return getattr(defaults, name) if given is None else given

        temperature = chosen("temperature")
        return SamplingParams(
            temperature=temperature if temperature >= _COLDEST else 0.0,
            top_k=max(0, chosen("top_k")),
            top_p=chosen("top_p"),
            min_p=chosen("min_p"),
            presence_penalty=chosen("presence_penalty"),
            frequency_penalty=chosen("frequency_penalty"),
            repetition_penalty=chosen("repetition_penalty"),
            logit_bias=self.logit_bias or {},
        )


class Function(_Request):
    """A function that a model may ask to be called. ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Request):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(_Request):
    """Which function."""

    name: str


class NamedTool(_Request):
    """A tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Request):
    """A schema that the answer is to have."""

    name: str = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Request):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Message(BaseModel):
    """A message of a conversation. Other fields are kept for the chat template, which may know them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag(TEXT)] | Annotated[list[dict[str, Any]], Field(fail_fast=True), Tag(OBJECTS)],
            one_of("a string or a list of parts", empty=OBJECTS),
        ]
        | None
    ) = None

    @field_validator("content")
    @classmethod
    def _only_text(cls, content: Any) -> str | None:
        if not isinstance(content, list):
            return content  # type: ignore[no-any-return]
        texts = []
        for part in content:
            if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                raise ValueError(f"content parts of type {part.get('type')!r} are not supported: only text is")
            texts.append(part["text"])
        return "".join(texts)


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    swarm_trace: bool = False
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[NamedTool, Tag(OBJECT)],
            one_of("none, auto, required, or a tool by its name"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class EmbeddingRequest(_Request):
    """``POST /v1/embeddings``."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class ResponsesRequest(_Request):
    """``POST /v1/responses``, as far as it needs no memory of earlier ones."""

    model: str
    input: Annotated[
        Annotated[str, Tag(TEXT)] | Annotated[list[dict[str, Any]], Field(fail_fast=True), Tag(OBJECTS)],
        one_of("a string or a list of messages", empty=OBJECTS),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    text: dict[str, Any] | None = None
