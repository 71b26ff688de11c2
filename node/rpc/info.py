"""``rpc_info``: what a node says about itself to whoever asks."""

from __future__ import annotations

from typing import Any

import torch
from hivemind.proto import runtime_pb2
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from swarm import __version__
from swarm.network.overview import METER
from swarm.wire import rpc

from ..engine.engine import Engine
from .requests import Served


def describe_node(engine: Engine, served: Served, uid: str) -> runtime_pb2.ExpertInfo:
    """The answer, with the shapes of what the blocks ``uid`` take if it names some, as Petals' clients ask."""
    stats = engine.stats()
    info: dict[str, Any] = {
        "version": f"swarm {__version__}",
        "dht_client_mode": False,
        "cache_tokens_available": stats.cache_block_tokens_free,
        "meter": {name: getattr(stats, name) for name in METER},
    }
    if uid:
        served.blocks_of(uid)
        hidden = BatchTensorDescriptor(1, 2048, served.hidden_size, dtype=served.dtype)
        extra = (BatchTensorDescriptor((), dtype=served.dtype), BatchTensorDescriptor((), dtype=torch.int64))
        info["forward_schema"] = ((hidden,), {})
        info["outputs_schema"] = (hidden,)
        info["keyword_names"] = ()
        info["inference_schema"] = ((hidden, *extra), {})
    return runtime_pb2.ExpertInfo(serialized_info=rpc.dump(info))
