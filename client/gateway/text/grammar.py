"""What may come next in a text that is to be JSON, or JSON of a schema: llguidance keeps track of it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from ..errors import invalid

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonGrammar:
    """A :class:`swarm.client.gateway.decode.generation.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """``[vocabulary]`` bool.

        Raises:
            ApiError: the schema is more than llguidance's limits let it keep track of.
        """
        mask = self._matcher.compute_bitmask()
        self._check()
        bits = np.frombuffer(mask, dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocabulary)).bool()

    def accept(self, token: int) -> None:
        """``token`` was taken."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing can come any more."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise invalid(f"the JSON schema can't be held to: {self._matcher.get_error()}")


class GrammarFactory:
    """Makes grammars for one tokenizer.

    Raises:
        ApiError: the tokenizer is not of the kind that llguidance reads.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        try:
            self._tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos) or None)
        except ValueError as error:
            raise invalid(f"this model's tokenizer can't be used with grammars: {error}") from error
        self._vocabulary = vocabulary

    def json_schema(self, schema: dict[str, Any], param: str) -> JsonGrammar:
        """JSON of a schema, without white space that has no end.

        Raises:
            ApiError: the schema is wrong, or has something that can't be held to.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_flexible": False})
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise invalid(f"the JSON schema can't be used: {problem}", param)
        return JsonGrammar(LLMatcher(self._tokenizer, grammar), self._vocabulary)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return bytes(self._tokenizer.decode_bytes([token]))
