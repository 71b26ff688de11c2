"""LoRA adapters (Hu et al., 2021) beside the base weights, several of them and none in one batch.

A base layer runs once over all tokens. Then each adapter's product with its two thin matrices is added to the tokens of
its own sessions, as in Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023). Their kernels take tokens in any
order; here the engine puts the sessions of one adapter side by side, and the products are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..attention.adapter_tokens import AdapterTokens

# between run_blocks and a layer lies transformers' code, which hands on no argument of ours; each thread has its own
_now: ContextVar[tuple[AdapterTokens, ...]] = ContextVar("adapters", default=())


@contextmanager
def using(tokens: tuple[AdapterTokens, ...]) -> Iterator[None]:
    """Layers that are called within get a batch of these tokens."""
    before = _now.set(tokens)
    try:
        yield
    finally:
        _now.reset(before)


class Lora(nn.Module):
    """What one adapter adds to one layer: ``[n, in]`` to ``[n, out]``, float32, as PEFT computes it by default.

    Args:
        down, up: ``[rank, in]`` and, scaled, ``[out, rank]``, float32.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        # two linear layers, so that make_deterministic finds them
        self.down, self.up = _linear(down), _linear(up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.up(self.down(x.float()))
        return output


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class LayerAdapters:
    """The adapters of one linear layer of any kind, as a hook behind its forward.

    Attributes:
        used: adapters that have been computed so far.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.used: set[str] = set()
        self._loras: dict[str, Lora] = {}
        self._layer = layer
        layer.register_forward_hook(self._add)

    def put(self, adapter: str, lora: Lora) -> None:
        """Adds an adapter."""
        self._layer.add_module(f"lora_{len(self._loras)}", lora)
        self._loras[adapter] = lora

    def _add(self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Sums in float32 and rounds once, as PEFT does. Differentiable where all tokens have the same adapter."""
        tokens = _now.get()
        mine = [(part, self._loras[part.adapter]) for part in tokens if part.adapter in self._loras]
        if not mine:
            return None
        self.used.update(part.adapter for part, _ in mine)
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(x) != tokens[-1].end:
            raise ValueError(f"a layer with adapters gets {len(x)} tokens of the batch's {tokens[-1].end}")
        if len(tokens) == 1:
            return (output + mine[0][1](x).view(output.shape)).to(output.dtype)
        flat = output.reshape(len(x), -1)
        for part, lora in mine:
            flat[part.begin : part.end].add_(lora(x[part.begin : part.end]))
        return flat.view(output.shape)
