"""Blocks that give a token the same bits whoever else is in the batch.

Four things of a block depend on the batch's size. Matrix products: :mod:`swarm.compute.tiles`. Activations: on a CPU,
what is left over when a tensor is cut into vectors, or into parts for threads, goes through other code, which rounds
differently. Experts: how many tokens each gets. Attention: ``pack`` in ``attention/batch.py`` gives each row a call of
its own, cut at fixed columns. The rest computes each row by itself, which :func:`check` makes sure of.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from swarm.compute.tiles import tile_linear, tiled
from swarm.errors import UsageError
from swarm.model.span import Span

from .attention.adapter_tokens import adapter_tokens
from .attention.batch import pack
from .cache.kv_cache import KVCache, Row
from .executor import run_blocks
from .scheduling.scheduler import PIECE_TOKENS

_GRAIN = 32768  # elements that torch never divides among threads
_VECTORS = 64  # elements that are a whole number of its vectors, in any dtype


def make_deterministic(block: nn.Module) -> None:
    """Changes ``block``, which has its weights, so that a row's result depends on nothing but the row."""
    functional = False
    for module in list(block.modules()):
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            tile_linear(module)
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            functional = True
        elif _is_activation(module):
            module.forward = functools.partial(_by_rows, module.forward)  # type: ignore[method-assign, assignment]
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # one expert after the other, by functions that _Tiled knows
    if functional:
        block.forward = functools.partial(_within, block.forward)  # type: ignore[method-assign, assignment]


def _is_activation(module: nn.Module) -> bool:
    parts = (*module.children(), *module.parameters(), *module.buffers())
    return not parts and not isinstance(module, (nn.Dropout, nn.Identity))


def _by_rows(compute: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``compute``, which works element by element or along the last dimension, of ``x`` ``[…, width]``."""
    if x.device.type != "cpu" or x.dim() < 2 or not x.numel():
        return compute(x, *args, **kwargs)
    width = x.shape[-1]
    flat = x.reshape(-1, width).contiguous()
    rows = max(1, _GRAIN // width) if width % _VECTORS == 0 else 1
    parts = [compute(part, *args, **kwargs) for part in flat.split(rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


def _within(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Tiled():
        return forward(*args, **kwargs)


class _Tiled(TorchFunctionMode):
    """Sees to functions that a block calls with parameters of its own, as routers and experts do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen_to = _FUNCTIONS.get(func)
        return seen_to(func, *args, **kwargs or {}) if seen_to is not None else func(*args, **kwargs or {})


def _linear(func: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return tiled(lambda rows: func(rows, weight, bias), input, (func, bias is not None, *_kernel(weight)))


def _matmul(func: Any, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if input.dim() == other.dim() == 3:  # all experts over all tokens
        return torch.stack([_matmul(torch.matmul, one, by) for one, by in zip(input, other, strict=True)])
    if other.dim() != 2:
        result: torch.Tensor = func(input, other)  # attention's own, of one row
        return result
    return tiled(lambda rows: torch.matmul(rows, other), input, (torch.matmul, *_kernel(other)))


def _addmm(func: Any, input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return tiled(lambda rows: torch.addmm(input, rows, mat2), mat1, (torch.addmm, *_kernel(mat2)))


def _kernel(weight: torch.Tensor) -> tuple[Any, ...]:
    return weight.shape, weight.stride(), weight.data_ptr() % 64, weight.dtype, weight.device


_ACTIVATIONS: tuple[Any, ...] = (
    *(nn.functional.silu, nn.functional.gelu, nn.functional.softplus, nn.functional.sigmoid, nn.functional.tanh),
    *(torch.sigmoid, torch.Tensor.sigmoid, torch.tanh, torch.Tensor.tanh, torch.exp, torch.Tensor.exp),
)
_FUNCTIONS: dict[Any, Callable[..., torch.Tensor]] = {
    nn.functional.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _matmul),
    **dict.fromkeys(_ACTIVATIONS, _by_rows),
}


@torch.inference_mode()
def check(span: Span, adapters: Sequence[str] = ()) -> None:
    """Runs one session alone and again among others, and compares the bits; with an adapter too, if there are any.

    Raises:
        UsageError: they differ, so this model can't be served deterministically here.
    """
    if not span.ropes_vary and all(_keeps_bits(span, adapter) for adapter in ("", *adapters[:1])):
        return
    raise UsageError(
        f"--deterministic can't be kept for {span.config.model_type} on this machine: a token's result depends on what "
        "else is computed with it. Leave the option out"
    )


def _keeps_bits(span: Span, adapter: str) -> bool:
    alone, together = _watch(span, (), adapter), _watch(span, (1, 2, 33, 12, 5, 70), adapter)
    return all(torch.equal(mine, again) for mine, again in zip(alone, together, strict=True))


def _watch(span: Span, others: tuple[int, ...], adapter: str) -> list[torch.Tensor]:
    """Outputs of a session with ``adapter``: a prompt of 70 tokens, then three more, with rows of ``others`` tokens
    around it, by turns without an adapter and with it."""
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(73, span.hidden_size, generator=generator).to(span.device, span.dtype)
    cache = KVCache(
        start=span.start,
        tokens=1024,
        page_size=16,
        kv=span.kv,
        dtype=span.dtype,
        device=span.devices,
        sources=span.kv_sources,
    )
    lengths = [*others[: len(others) // 2], 70, *others[len(others) // 2 :]]
    watched = len(others) // 2
    rows = cache.arrange(
        [Row() for _ in lengths],
        sources=None,
        keep=[0] * len(lengths),
        grow=[length + 3 for length in lengths],
        blocks=range(span.start, span.end),
    )
    outputs: list[torch.Tensor] = []
    done = 0
    for step in (lengths, *[[1] * len(lengths)] * 3):
        inputs = [torch.randn(count, span.hidden_size, generator=generator).to(mine) for count in step]
        inputs[watched] = mine[done : done + step[watched]]
        done += step[watched]
        batch = pack(cache, list(zip(rows, step, strict=True)), span.device, pieces=[(0, PIECE_TOKENS)] * len(rows))
        turns = itertools.cycle(("", adapter))
        names = [adapter if row == watched else next(turns) for row in range(len(rows))]
        batch = replace(batch, adapters=adapter_tokens(zip(names, step, strict=True)))
        output = run_blocks(span, torch.cat(inputs)[None], batch, first=span.start, last=span.end)[0]
        outputs.append(output.split(step)[watched])
        for row, count in zip(rows, step, strict=True):
            row.length += count
    return outputs
