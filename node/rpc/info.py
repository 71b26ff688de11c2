"""What a node says about itself when it is asked: ``rpc_info``."""

from __future__ import annotations

from typing import Any

import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from swarm import __version__
from swarm.network.overview import METER

from ..engine.stats import EngineStats
from .requests import Served


def describe(uid: str, served: Served, stats: EngineStats) -> dict[str, Any]:
    """The node now and, as Petals' clients want it, what its requests look like if ``uid`` names blocks.

    Raises:
        BadRequestError: ``uid`` names blocks that aren't here.
    """
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
    return info
