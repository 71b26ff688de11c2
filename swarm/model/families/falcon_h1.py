"""Falcon-H1: attention and Mamba side by side in each block."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.modules import compute_mup_vector
from .base import Family


class FalconH1Family(Family):
    """All sizes of Falcon-H1."""

    def buffer(self, module: nn.Module, name: str, config: PreTrainedConfig) -> torch.Tensor | None:
        # transformers fills this one from the whole model, which isn't here
        return compute_mup_vector(config) if name == "mup_vector" else None
