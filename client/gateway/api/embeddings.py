"""``POST /v1/embeddings``: the mean of the last hidden states, of length one."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import invalid
from ..requests.schemas import EmbeddingRequest
from ..served_model import ServedModel
from .call import Call
from .reply import Answer


async def embed(model: ServedModel, request: EmbeddingRequest, call: Call) -> Answer:
    """A vector for each input."""
    if request.dimensions is not None:
        raise invalid("dimensions is not supported: this model's vectors have one size", "dimensions")
    prompts = await model.prompts(request.input, "input")
    for prompt in prompts:
        model.room(prompt, 0, "input")
    call.prompt_tokens = sum(map(len, prompts))
    model.engine.check_room(1)  # they wait for each other, so many of them don't fill the queue
    vectors = await model.engine.embed_texts(prompts, call.route, model.adapter)
    return {
        "object": "list",
        "model": model.id,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens},
    }


def _encoded(vector: Tensor, encoding: str) -> Any:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype(np.dtype("<f4")).tobytes()).decode()
