"""Llama-like blocks in few operations, on a CPU: what transformers' modules compute, without the modules.

Behind a product whose weights have pushed everything else out of the processor's caches, a small operation, and the
Python around it, takes several times what it takes in a loop: in a decode step of a small block, as long as its
products. Here there are two thirds of the operations, and hardly any Python (docs/benchmarks.md).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from swarm.compute.packed_linear import PackedLinear
from swarm.model.probe import KVGeometry

from ..attention.attention import attention
from ..attention.batch import pack
from ..cache.kv_cache import KVCache, Row
from .joined_linear import joined

_ALIKE = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Blocks whose code is Llama's but for windows, biases and norms of queries and keys."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of the largest result, in the trial; another computation is off by about all of it."""

_agreed: dict[str, bool] = {}
"""Verdicts by dtype and what a block prints. They depend on nothing else, and a trial takes as long as a few steps: too
long for each of eighty blocks that are alike, so they are kept for the process."""


def lighten_block(block: nn.Module) -> None:
    """Has ``block``, which is ready to compute otherwise, computed as a :class:`LeanBlock`, if it is like Llama's."""
    weight = next(block.parameters(), None)
    if type(block).__name__ not in _ALIKE or weight is None or weight.device.type != "cpu":
        return
    key = f"{weight.dtype} {block}"
    if not _agreed.get(key, True):
        return
    try:
        lean = LeanBlock(block)
        if key not in _agreed:
            _agreed[key] = _agree(block, lean, weight.dtype)
    except (AttributeError, RuntimeError):  # a version of transformers whose blocks have other parts
        _agreed[key] = False
    if _agreed[key]:
        block.forward = lean  # type: ignore[method-assign, assignment]


class LeanBlock:
    """Stands for the ``forward`` of ``block``, and calls it for gradients and adapters.

    Raises:
        AttributeError: the block has other parts than Llama's.
    """

    def __init__(self, block: Any) -> None:
        heads, mlp = block.self_attn, block.mlp
        # not the block itself: what holds itself stays in memory until the garbage collector comes by
        self._block = weakref.ref(block)
        self._module, self._scaling, self._dim = heads, heads.scaling, heads.head_dim
        self._heads, self._kv_heads = heads.config.num_attention_heads, heads.config.num_key_value_heads
        self._window = getattr(heads, "sliding_window", None)
        if type(block).__name__ == "MistralDecoderLayer":
            self._window = getattr(heads.config, "sliding_window", None)
        self._norm, self._mlp_norm = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self._query_key_norm: tuple[torch.Tensor, float] | None = None
        if hasattr(heads, "q_norm"):
            each = heads.q_norm.weight.expand(self._heads, -1), heads.k_norm.weight.expand(self._kv_heads, -1)
            self._query_key_norm = torch.cat(each).detach(), heads.q_norm.variance_epsilon
        self._inputs = _together(heads.q_proj, heads.k_proj, heads.v_proj)
        self._output = _compute(heads.o_proj)
        self._gate_up = _each(mlp.gate_proj, mlp.up_proj)
        self._down = _compute(mlp.down_proj)

    def __call__(self, hidden: torch.Tensor, *, batch: Any, position_embeddings: Any, **options: Any) -> torch.Tensor:
        """``hidden`` ``[1, N, H]`` in and out."""
        if batch.adapters or (torch.is_grad_enabled() and hidden.requires_grad):
            return self.usual(hidden, batch=batch, position_embeddings=position_embeddings, **options)
        tokens, turned = hidden.shape[1], self._heads + self._kv_heads
        states = self._inputs(self._norm(hidden)).view(1, tokens, -1, self._dim)
        query_key, value = states.split((turned, self._kv_heads), 2)
        if self._query_key_norm is not None:
            weight, eps = self._query_key_norm
            query_key = rms_norm(query_key, (self._dim,), None, eps) * weight
        cos, sin = _rotation(batch, *position_embeddings)
        query_key = torch.addcmul(query_key * cos, query_key.roll(self._dim // 2, -1), sin)
        query, key = query_key.split((self._heads, self._kv_heads), 2)
        mixed, _ = attention(
            self._module,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            batch=batch,
            scaling=self._scaling,
            sliding_window=self._window,
        )
        hidden = hidden + self._output(mixed.reshape(1, tokens, -1))
        gate, up = self._gate_up(self._mlp_norm(hidden))
        return hidden + self._down(silu(gate).mul_(up))

    def usual(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """The same by the block's own code."""
        block = self._block()
        output: torch.Tensor = type(block).forward(block, hidden, **options)  # type: ignore[union-attr, arg-type]
        return output


class _Norm:
    """An RMS norm (Zhang and Sennrich, 2019), in float32 inside."""

    def __init__(self, module: Any) -> None:
        self._weight, self._eps = module.weight.detach(), module.variance_epsilon
        self._wide = self._weight.float()
        self._zero = torch.zeros_like(self._wide)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 1:
            return rms_norm(x, self._weight.shape, self._weight, self._eps)
        wide = x.float()
        flat = wide.reshape(-1)
        scale = 1 / math.sqrt(torch.dot(flat, flat).item() / len(flat) + self._eps)
        return torch.addcmul(self._zero, wide, self._wide, value=scale).to(x.dtype)


def _rotation(batch: Any, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embeddings (Su et al., 2021) ``[1, N, dim]`` in the form ``[1, N, 1, dim]`` that this takes: the halves
    change places by a roll, so the sign is with the sines. Made once for all blocks of ``batch``."""
    name = ("rotation", id(sin))
    made = batch.made.get(name)
    if made is None:
        first, second = sin.unsqueeze(2).chunk(2, -1)
        made = batch.made[name] = cos.unsqueeze(2), torch.cat((-first, second), -1), sin
    return made[0], made[1]


def _compute(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return layer.compute if isinstance(layer, PackedLinear) else layer


def _together(*layers: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ``layers`` make of one input, side by side."""
    whole = joined(layers)
    if whole is not None:
        return whole.compute
    each = [_compute(layer) for layer in layers]
    return lambda x: torch.cat([compute(x) for compute in each], -1)


def _each(*layers: Any) -> Callable[[torch.Tensor], Any]:
    """What ``layers`` make of one input, one by one."""
    whole = joined(layers)
    if whole is not None:
        compute, sizes = whole.compute, [layer.out_features for layer in layers]
        return lambda x: compute(x).split(sizes, -1)
    each = [_compute(layer) for layer in layers]
    return lambda x: [compute(x) for compute in each]


@torch.inference_mode()
def _agree(block: Any, lean: LeanBlock, dtype: torch.dtype) -> bool:
    """Whether both compute the same of some tokens, and of one more."""
    heads, generator = block.self_attn, torch.Generator().manual_seed(0)
    kv = KVGeometry(heads.config.num_key_value_heads, heads.head_dim, heads.head_dim)
    cache = KVCache(start=heads.layer_idx, tokens=16, page_size=16, kv=[kv], dtype=dtype, device=torch.device("cpu"))
    blocks = range(heads.layer_idx, heads.layer_idx + 1)
    (row,) = cache.arrange([Row()], sources=None, keep=[0], grow=[4], blocks=blocks)
    for tokens in (3, 1):
        hidden = torch.randn(1, tokens, heads.config.hidden_size, generator=generator).to(dtype)
        cos, sin = torch.randn(2, 1, tokens, heads.head_dim, generator=generator).to(dtype)
        batch = pack(cache, [(row, tokens)], torch.device("cpu"))
        options = {"batch": batch, "position_embeddings": (cos, sin), "attention_mask": None}
        usual, ours = lean.usual(hidden, **options), lean(hidden, **options)
        if not (ours - usual).abs().max() <= _TOLERANCE[dtype] * usual.abs().max():
            return False
        row.length += tokens
    return True
