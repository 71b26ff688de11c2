"""What the engine can use of a GPU: a kernel for attention over pages, and recorded decode steps."""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from swarm.model.probe import KVGeometry
from swarm.model.span import Span

from ..attention.attention import attention
from ..attention.batch import pack
from ..cache.kv_cache import KVCache, Row
from ..cache.paged_kernel import PagedKernel, torch_kernel
from .static_decode import Record, Step

logger = logging.getLogger(__name__)

_WARM_UPS = 2
_ONE_RECORDING = threading.Lock()  # torch allows one at a time in a process, which may have several engines


@dataclass(frozen=True)
class Acceleration:
    """How an engine runs its span; by default the way that works everywhere.

    Attributes:
        kernel: attends over pages in place.
        record: records decode steps; only together with a kernel.
        page_size: tokens per page of the KV cache.
    """

    kernel: PagedKernel | None = None
    record: Record | None = None
    page_size: int = 16


def accelerate(span: Span, *, graphs: bool = True) -> Acceleration:
    """What ``span`` can use, tried out on its devices. What it can't use is said in the log.

    Args:
        graphs: whether to record decode steps.
    """
    if span.device.type != "cuda" or (kernel := torch_kernel()) is None:
        return Acceleration()
    shapes = [shape for shape in dict.fromkeys(span.kv) if shape is not None]
    suited = [shape for shape in shapes if kernel.suits(span.dtype, shape.key_dim, shape.value_dim)]
    for shape in shapes:
        if shape not in suited:
            what = f"{span.dtype} with heads of {shape.key_dim}"
            logger.warning("paged attention: not for %s; attention runs row by row", what)
    if not suited:
        return Acceleration()
    for device, shape in itertools.product(dict.fromkeys(span.devices), suited):
        heads = getattr(span.config, "num_attention_heads", shape.kv_heads)
        if trouble := find_trouble(kernel, device, span.dtype, heads, shape.kv_heads, shape.key_dim):
            logger.warning("paged attention: not on %s (%s); attention runs row by row", device, trouble)
            return Acceleration()
    if reason := why_unrecorded(span):
        logger.warning("decode steps run unrecorded, which is slower: %s", reason)
    return Acceleration(kernel, GraphRecorder() if graphs and not reason else None, kernel.page_size)


def find_trouble(
    kernel: PagedKernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> str | None:
    """Runs ``kernel`` on a few rows of many lengths and compares with attention row by row. None: it is right here."""
    size = kernel.page_size
    shape = KVGeometry(kv_heads, dim, dim)
    cache = KVCache(start=0, tokens=16 * size, page_size=size, kv=[shape], dtype=dtype, device=device, kernel=kernel)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for pool in (cache.keys[0], cache.values[0]):
        pool.copy_(random(*pool.shape))
    long = Row(9 * size - 7, [15, 3, 9, 1, 12, 6, 0, 10, 4], contiguous=False)
    rows = [(Row(0, [2]), 1), (long, 1), (Row(size + 5, [7, 8]), 1)]
    mixed = [(Row(0, [5]), 3), (long, 5), (Row(size - 1, [13]), 1)]
    module: Any = SimpleNamespace(layer_idx=0)
    try:
        for chosen, window in ((rows, None), (rows[:1], None), (rows, size), (mixed, None), (mixed, size // 2)):
            batch = pack(cache, chosen, device)
            tokens = batch.positions.shape[1]
            # far apart, so that each query is about a few keys: a key too many or too few is seen
            query = 4 * random(1, heads, tokens, dim)
            key, value = random(1, kv_heads, tokens, dim), random(1, kv_heads, tokens, dim)
            mine, theirs = (
                attention(module, query, key, value, batch=each, sliding_window=window)[0].float()
                for each in (batch, replace(batch, paged=None))
            )
            if not torch.allclose(mine, theirs, atol=3e-2, rtol=3e-2):
                return f"its results are off by {float((mine - theirs).abs().max()):.3g}"
    except Exception as error:  # a driver, a build or a card that it doesn't run on
        return f"{type(error).__name__}: {error}"
    return None


def why_unrecorded(span: Span) -> str | None:
    """Why decode steps of ``span`` can't be recorded; None if nothing speaks against it."""
    if span.ropes_vary:
        return "rotary frequencies depend on the positions at hand"
    if span.state_bytes:
        return "recurrent states are kept row by row"
    experts = getattr(span.config, "_experts_implementation", None)
    if experts not in ("grouped_mm", "batched_mm") and any(one.dim() == 3 for one in span.blocks.parameters()):
        return "transformers runs this model's experts one by one, chosen on the CPU"
    return None


class GraphRecorder:
    """Records steps as CUDA graphs, which share one pool of memory on each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[torch.device, Any] = {}
        self._failed = False

    def __call__(self, device: torch.device, step: Step) -> Step:
        """Run ``step`` a few times, then record it.

        Raises:
            RuntimeError: a step can't be recorded. No other is tried then: CUDA may hold on to some memory each time.
        """
        if self._failed:
            raise RuntimeError("recording failed before")
        with _ONE_RECORDING, torch.cuda.device(device):
            before = torch.cuda.current_stream()
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()
                self._pools[device] = torch.cuda.graph_pool_handle()
            # Warm-up and recording on the same stream, which has its own workspaces in cuBLAS
            stream = self._streams[device]
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        step()
                before.wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                self._failed = True
                # Other threads of a node may use CUDA meanwhile: only what this one does must not be waited for
                with torch.cuda.graph(
                    graph, pool=self._pools[device], stream=stream, capture_error_mode="thread_local"
                ):
                    step()
                self._failed = False
            finally:
                torch.cuda.set_stream(before)  # which a recording that fails doesn't do
        return graph.replay
