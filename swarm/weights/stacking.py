"""Experts that a checkpoint stores one by one and the model holds in one tensor, put together in place.

transformers would read all parts, stack them and then concatenate the stacks, and so hold a block's experts up to
three times. Filling the final tensor part by part needs it once, and one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class LazyStack:
    """A tensor ``[parts, rows, ...]`` that is put together when it is indexed with ``[...]``.

    Attributes:
        name: the model's name of it.
        shape: as the model has it.
        columns: the checkpoint's names of its parts: for each kind (gate, up), from the first part to the last.
        dtype: to make it in.
    """

    checkpoint: Checkpoint
    name: str
    shape: torch.Size
    columns: Sequence[Sequence[str]]
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        parts = self.shape[0]
        for column in self.columns:
            if len(column) != parts:
                raise ModelError(self._incomplete(column))
        whole = torch.empty(self.shape, dtype=self.dtype)
        row = 0
        for column in self.columns:
            rows = 0
            for index, key in enumerate(column):
                part = self.checkpoint.read(key)
                rows = part.shape[0] if index == 0 else rows
                room = whole[index, row : row + rows]
                if room.shape != part.shape:
                    raise self._misfit(key, part.shape)
                room.copy_(part)
            row += rows
        if row != self.shape[1]:
            raise self._misfit(self.columns[-1][0], torch.Size([row, *self.shape[2:]]))
        return whole

    def _misfit(self, key: str, found: torch.Size) -> ModelError:
        return ModelError(
            f"tensor {key} in {self.checkpoint.info(key).file} has shape {list(found)}, which does not fit {self.name} "
            f"{list(self.shape)}: config.json and weights don't belong together"
        )

    def _incomplete(self, column: Sequence[str]) -> str:
        for key in column[:1]:
            pieces = key.split(".")
            at = max(index for index, piece in enumerate(pieces) if piece.isdigit())
            for number in range(self.shape[0]):
                pieces[at] = str(number)
                if (missing := ".".join(pieces)) not in self.checkpoint:
                    return f"tensor {missing} is missing from {self.checkpoint.listing}: the checkpoint is incomplete"
        return (
            f"tensor {self.name} needs {self.shape[0]} parts of each kind, but {self.checkpoint.listing} has "
            f"{len(column)} of one: the checkpoint is incomplete, or not that of this config.json"
        )
