"""Tiny models, their span, and what transformers' whole model makes of the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.model.skeleton import load_span
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.node.engine.blocks.quantization import finish_block
from swarm.node.engine.engine import Engine
from tests.models import tiny_model


@dataclass(frozen=True)
class Reference:
    """A whole model. ``blocks(ids)`` are the inputs of each block, and the last block's output at the end."""

    model: PreTrainedModel
    span: Span

    def layers(self) -> Any:
        base = self.model.base_model
        return base.layers if hasattr(base, "layers") else base.h

    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        return self.blocks(ids)[0]

    @torch.no_grad()
    def blocks(self, ids: torch.Tensor) -> list[torch.Tensor]:
        last: list[torch.Tensor] = []
        hook = self.layers()[-1].register_forward_hook(
            lambda _module, _inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        states = self.model(ids, output_hidden_states=True).hidden_states
        hook.remove()
        return [*states[:-1], last[0]]


_REFERENCES: dict[str, Reference] = {}


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    def get(like: str) -> Reference:
        if like not in _REFERENCES:
            path = str(tiny_model(like, layers=4))
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            model.requires_grad_(False)
            span = load_span(resolve(path), 0, 4, dtype=torch.float32, device="cpu", finish=finish_block)
            _REFERENCES[like] = Reference(model, span)
        return _REFERENCES[like]

    return get


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(span: Any, *, running: bool = True, **options: Any) -> Engine:
        engine = Engine(span, **{"cache_tokens": 4096, "page_size": 4, "max_batch_tokens": 64} | options)
        if running:
            engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop()
