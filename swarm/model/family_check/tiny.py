"""A tiny random model of a family, and what transformers computes with it as a whole: what ours is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...compat.building import build_model
from ...compat.whole import call_of_first_block, find_blocks, load_whole, run_whole, saved_tensors
from ..families import family_of
from ..model_source import ModelSource
from ..source import resolve
from .random_weights import random_weight
from .table import Case

PROMPT, NEW = 19, 3
"""Tokens: a prompt longer than any window in the table, and those that greedy decoding adds."""
_TOLERANCE = 2e-5  # of the largest number, or of one


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint in a directory, and a pass of transformers' over it, without a cache.

    Attributes:
        ids: ``[1, PROMPT + NEW]`` int64, the end of which is transformers' greedy continuation.
        first: ``[1, PROMPT + NEW, carried]`` float32, what goes to the first block as a client sends it.
        last: what comes from the last block, likewise.
        logits: ``[1, PROMPT + NEW, vocabulary]`` float32.
    """

    case: Case
    source: ModelSource
    ids: Tensor
    first: Tensor
    last: Tensor
    logits: Tensor


def make_tiny(case: Case, directory: Path) -> TinyModel:
    """Writes the tiny model of ``case`` to ``directory``, and has transformers compute it. Draws from no generator that
    others use."""
    _write(case, directory)
    whole, family = load_whole(directory), family_of(case.model_type)
    ids = torch.randint(10, 250, (1, PROMPT), generator=torch.Generator().manual_seed(case.seed))
    for _ in range(NEW):
        logits, _ = run_whole(whole, ids)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    logits, last = run_whole(whole, ids)
    family.adapt_trunk(find_blocks(whole)[0])  # now it calls one block as a client's does
    hidden, rest = call_of_first_block(whole, ids)
    source = resolve(str(directory))
    return TinyModel(case, source, ids, family.pack(hidden, rest), family.pack(last, rest), logits)


def _write(case: Case, directory: Path) -> None:
    """A checkpoint as those on the Hub are."""
    config = case.config()
    model = build_model(config, torch.float32, None)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    std, generator = getattr(config, "initializer_range", 0.15), torch.Generator().manual_seed(case.seed)
    tensors = {
        name: torch.cat(list(random_weight(name, like, std, generator))).view(like.shape)
        for name, like in saved_tensors(model).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def difference(what: str, mine: Tensor, theirs: Tensor) -> str:
    """Says that ``mine`` is not what transformers computes (``theirs``), and by how much; empty: it is."""
    if mine.shape != theirs.shape:
        return f"{what} are of shape {list(mine.shape)}, not {list(theirs.shape)}"
    allowed = _TOLERANCE * max(1.0, float(theirs.abs().max()))
    off = float((mine - theirs).abs().max())
    right = off <= allowed  # and a number
    return "" if right else f"{what} are off by {off:.2g} (allowed: {allowed:.2g})"
