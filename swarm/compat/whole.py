"""transformers' own way with a whole model: what it writes and reads, and what goes into its blocks and comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .building import LAYER_LISTS, tied_names
from .loading import quiet


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of ``model``, which may be on the meta device, by the names that a checkpoint on the Hub has; tied
    ones once."""
    tied = tied_names(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tensor for name, tensor in revert_weight_conversion(model, own).items() if tensor is not None}


def load_whole(directory: Path) -> PreTrainedModel:
    """A causal language model as transformers loads it for everybody: on the CPU, in float32. Whatever that draws, the
    global generator is as before."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    # Its usual attention: with ALiBi, Falcon's plainest computes something else. But
    # transformers before 5.21 leaves the caps of Gemma 2 out of all but its plainest attention
    options = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with quiet(), torch.random.fork_rng(devices=()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, **options
        )
    return model.eval()


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that has the list of blocks, and the list.

    Raises:
        LookupError: there is none under a name that is known.
    """
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in LAYER_LISTS and isinstance(module, nn.ModuleList):
            return model.get_submodule(parent), module
    raise LookupError(f"{type(model).__name__} has no list of blocks")


def run_whole(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Without a cache: logits ``[rows, T, vocabulary]``, and what the last block gives, in the family's own shape."""
    kept: list[Tensor] = []

    def keep(block: nn.Module, given: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    hook = find_blocks(model)[1][-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            logits: Tensor = model(ids, use_cache=False).logits
    finally:
        hook.remove()
    return logits, kept[0]


class _EnoughError(Exception):
    """What was wanted of a model's pass is there."""


def call_of_first_block(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """What a model calls its first block with: hidden states, and the other positional arguments. No block is run."""
    calls: list[tuple[Tensor, tuple[Any, ...]]] = []

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        calls.append((hidden, rest))
        raise _EnoughError

    hook = find_blocks(model)[1][0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    except _EnoughError:
        pass
    finally:
        hook.remove()
    return calls[0]
