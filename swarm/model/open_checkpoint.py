"""The checkpoint of a model, of whichever kind it is."""

from __future__ import annotations

from ..weights.checkpoint import Checkpoint, open_files
from ..weights.gguf_file import GgufCheckpoint
from ..weights.sharing.checkpoint import StoreCheckpoint
from .model_source import ModelSource


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """The checkpoint of ``source``. A Hub model without an index is one file, whose header is downloaded here.

    The weights of a quantized one are there under their ordinary names, as if they were stored in ``source.dtype``.

    Raises:
        ModelError: no safetensors weights, or an index or header that can't be read.
    """
    if source.path.is_file():
        return GgufCheckpoint(source.path, source.config, source.dtype)
    store = source.store
    checkpoint = open_files(source.path, source.hub) if store is None else StoreCheckpoint(store)
    if source.quantization is not None:
        checkpoint.compute_weights(source.quantization.formats, source.dtype)
    return checkpoint
