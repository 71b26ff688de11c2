"""Experts of a mixture, which transformers holds in one tensor ``[experts, out, in]`` for each projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .matrices.matrix import QuantizedMatrix

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def expert_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights ``[experts, out, in]`` by projection, if ``module`` holds experts by transformers' common interface
    (``use_experts_implementation``), else nothing."""
    if not hasattr(module, "_apply_gate"):
        return {}
    weights = {name: _weights_of(module, name) for name in _PROJECTIONS}
    found = {name: weight for name, weight in weights.items() if weight is not None}
    return found if len(found) == 2 and "down_proj" in found else {}


def _weights_of(module: nn.Module, name: str) -> torch.Tensor | None:
    weight = getattr(module, name, None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 3:
        return None
    return weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight


class QuantizedExperts(nn.Module):
    """Computes what the experts that it is made of compute, one after the other of those that a token chose.

    What is special about a family (how gate and up are told apart, the activation) stays with its own module, which
    loses its weights. ``matrices``: by projection, one for each expert.
    """

    def __init__(self, experts: nn.Module, matrices: Mapping[str, Iterable[QuantizedMatrix]]) -> None:
        super().__init__()
        self.family: Any = experts
        for name, made in matrices.items():
            self.add_module(name, nn.ModuleList(made))
            delattr(experts, name)

    @classmethod
    def of(cls, experts: nn.Module, make: Callable[[torch.Tensor], QuantizedMatrix]) -> QuantizedExperts:
        """Quantizes the weights of ``experts``, which go projection by projection."""
        self = cls(experts, {})
        for name in list(expert_weights(experts)):
            weights = _weights_of(experts, name)
            assert weights is not None
            self.add_module(name, nn.ModuleList(make(weight.contiguous()) for weight in weights))
            del weights
            delattr(experts, name)
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states`` ``[N, H]``, as the result; ``top_k_index`` (int64) and ``top_k_weights`` ``[N, k]``."""
        gated = "gate_up_proj" in self._modules
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, choices = torch.where(top_k_index == expert)
            inner = self._project("gate_up_proj" if gated else "up_proj", expert, hidden_states[tokens])
            inner = self.family._apply_gate(inner) if gated else self.family.act_fn(inner)
            part = self._project("down_proj", expert, inner)
            if getattr(self.family, "has_post_expert_norm", False):
                part = self.family.post_expert_norm(part)
            part = part * top_k_weights[tokens, choices, None]
            output = output.index_add(0, tokens, part.to(output.dtype))
        return output

    def _project(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.get_submodule(name)[expert](x)  # type: ignore[index]
        bias = getattr(self.family, f"{name}_bias", None)
        return output if bias is None else output + bias[expert]
