"""A model that can be loaded: its config, its sizes, where its weights are, and its name in the DHT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..weights.dequantize import Quantization
from ..weights.hub.one_file import HubRepo
from .layout import carried_size, inner_boundaries

if TYPE_CHECKING:
    from ..weights.sharing.store import WeightStore


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: where it is, and what its config says.

    Attributes:
        name: as the user typed it.
        path: the directory that holds ``config.json``; for a local model the weights too. Or a GGUF file.
        config: the transformers config of the (text) model. Shared: copy it before changing it.
        dht_prefix: the model's name in the DHT; block ``i`` is announced under ``{dht_prefix}.{i}``.
        dtype: of the checkpoint.
        hub: the Hub repository, pinned to one commit; None for a local model.
        quantization: how the checkpoint is quantized; None if it isn't. ``config`` does not mention it: weights are
            dequantized when they are read.
        store: for weights that come from peers, where they are kept.
    """

    name: str
    path: Path
    config: PreTrainedConfig
    dht_prefix: str
    dtype: torch.dtype
    hub: HubRepo | None = None
    quantization: Quantization | None = None
    store: WeightStore | None = None

    @property
    def is_local(self) -> bool:
        return self.hub is None

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Of what goes from block to block: more than the config's in models whose blocks need more of each token."""
        return carried_size(self.config)

    @property
    def inner_boundaries(self) -> frozenset[int]:
        """Where no span may begin or end (:func:`swarm.model.layout.inner_boundaries`)."""
        return inner_boundaries(self.config)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a recurrent state, which can't be cut back to an earlier token."""
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        return bool(model_class._is_stateful)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for; None if its config does not say (ALiBi models)."""
        for name in ("max_position_embeddings", "seq_length"):
            if (value := getattr(self.config, name, None)) is not None:
                return int(value)
        return None
