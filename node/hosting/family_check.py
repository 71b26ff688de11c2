"""Whether blocks of a family are computed right here: a tiny model through an engine, compared with transformers'."""

from __future__ import annotations

import torch

from swarm.model.family_check.check import check_family
from swarm.model.family_check.tiny import PROMPT, TinyModel, difference
from swarm.model.loading import load_span

from ..engine.blocks.finish import finish_block
from ..engine.engine import Engine
from ..output import Output

_PIECES = (12, PROMPT - 12)
"""Into which the prompt is cut; then come the other tokens one by one."""


def require_right_blocks(model_type: str, output: Output) -> None:
    """With versions that aren't tested, checks this family's blocks.

    Raises:
        ModelError: they aren't as transformers'.
    """
    check_family(model_type, "blocks", check_blocks, lambda text: output.event("check", text))


def check_blocks(tiny: TinyModel) -> str:
    """Says in what all blocks together differ from transformers', or nothing. On the CPU, whatever the node has: GPUs
    compute with the same modules, and what is only theirs is tried when a span is loaded."""
    count = tiny.source.num_blocks
    span = load_span(tiny.source, 0, count, dtype=torch.float32, device="cpu", finish=finish_block)
    engine = Engine(span, cache_tokens=256, page_size=4, max_batch_tokens=32)
    engine.start()
    try:
        session = engine.open(rows=1, first=0, last=count)
        done = []
        at = 0
        for piece in tiny.first.split([*_PIECES, *[1] * (tiny.ids.shape[1] - PROMPT)], dim=1):
            done.append(engine.step(session, piece, start=at).result())
            at += piece.shape[1]
    finally:
        engine.stop()
    return difference("hidden states after the last block", torch.cat(done, dim=1), tiny.last)
