"""Puts the swarm where a family's own model has its list of layers.

The family's code keeps doing all else: embeddings and their scaling, final norm, output head, caps on logits, loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from swarm.errors import ModelError
from swarm.families import family_of
from swarm.forks import refuse_fork

from .cache import SinglePass, SwarmCache
from .generation import current_generation
from .padding import left_padding_for_pass
from .remote_blocks import RemoteBlocks

NO_ATTENTION = "swarm_client"
"""Set as the attention implementation. transformers builds no masks for one that it doesn't know."""

_LAYER_LISTS = ("layers", "h", "blocks")


class StackOfBlocks(nn.Module):
    """All blocks as one layer. ``past_key_values`` says where they are (see :mod:`swarm.client.cache`)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.gives_tuple = False
        self._config, self._family = config, family_of(config.model_type)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        past = kwargs.get("past_key_values")
        if past is None:
            past = kwargs.get("layer_past")  # BLOOM and Falcon
        if past is None:
            past = next(given for given in args if isinstance(given, SwarmCache | SinglePass | Echo))  # GPT-2
        hidden = self._family.unpack(past.run(self._family.pack(hidden_states, args)), self._config)
        return (hidden, None) if self.gives_tuple else hidden


class _OneLayer(nn.ModuleList):
    """Slicing makes no new list: most families slice their list for every token."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


class _NoPositions(nn.Module):
    """In place of rotary embeddings, which only blocks use."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        return None, None


class Echo(Cache):
    """Blocks that do nothing, to find out what a family's loop expects of a layer, or to run the ends alone."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def run(self, hidden: Tensor) -> Tensor:
        return hidden

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def put_blocks_in(model: PreTrainedModel, blocks: RemoteBlocks) -> None:
    """Make ``blocks`` the layers of ``model``, whose own list of layers is empty.

    Raises:
        ModelError: the model's code is not of a shape that this can work with.
    """
    trunk, name = _trunk_of(model)
    family_of(model.config.model_type).adapt_trunk(trunk)
    stack = StackOfBlocks(model.config)
    setattr(trunk, name, _OneLayer([stack]))
    for child, module in list(trunk.named_children()):
        if "rotary" in child or "rotary" in type(module).__name__.lower():
            setattr(trunk, child, _NoPositions())
    _drop_position_biases(trunk)
    model.config._attn_implementation = NO_ATTENTION
    for flag in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(model.config, flag, None):
            setattr(model.config, flag, False)
    stack.gives_tuple = _expects_tuple(trunk, stack)
    trunk.register_forward_pre_hook(_Entry(blocks), with_kwargs=True)
    trunk.register_forward_hook(_take_back_pass)
    model.register_forward_pre_hook(_note_wanted, with_kwargs=True)


class _Entry:
    """Before the trunk runs: turn the caller's cache and mask into what :class:`StackOfBlocks` calls.

    A hook of the trunk, and not of the whole model, so that ``model.model(…)`` works too.
    """

    def __init__(self, blocks: RemoteBlocks) -> None:
        self._blocks = blocks

    def __call__(
        self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        refuse_fork()  # before embeddings: torch's threads don't survive a fork either
        for flag in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(flag):
                raise ValueError(
                    f"{flag}=True can't be had from a swarm: what is inside the model stays on the nodes. "
                    "For the hidden states after some block, use model.blocks[a:b](hidden)"
                )
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = ids if embeds is None else embeds
        if given is None:
            return args, kwargs  # the family's own code complains
        rows, columns = given.shape[:2]
        mask = kwargs.get("attention_mask")
        past = kwargs.get("past_key_values")
        if isinstance(past, Echo):
            return args, kwargs
        generation = current_generation()
        if past is None and kwargs.get("use_cache") and generation is not None and generation.cache.needed:
            past = generation.open_beside(self._blocks, columns)
            kwargs = {**kwargs, "past_key_values": past}
        if isinstance(past, SwarmCache):
            past.begin(rows, columns, mask, ids if embeds is None else None)
            padding = past.left_padding or ()
        else:
            if past is not None and past.get_seq_length() > 0:
                raise ValueError(
                    f"past_key_values has to be a session's cache (session.cache), not {type(past).__name__}"
                )
            if kwargs.get("use_cache"):
                raise ValueError(
                    "use_cache=True needs room on the nodes: "
                    "with model.session(max_length=…) as session: model(…, past_key_values=session.cache)"
                )
            padding = left_padding_for_pass(mask, rows, columns)
            kwargs = {**kwargs, "past_key_values": SinglePass(self._blocks, padding), "use_cache": False}
        if columns > 1:
            _check_positions(kwargs.get("position_ids"), mask)
        return args, kwargs


def _note_wanted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the cache of how many columns logits will be made: ``generate()`` needs the last one's only."""
    past, kept = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
    if isinstance(past, SwarmCache):
        past.want(kept if isinstance(kept, int) and kept > 0 and kwargs.get("labels") is None else None)


def _take_back_pass(trunk: nn.Module, args: Any, output: Any) -> Any:
    """A :class:`SinglePass` is no cache to go on with, so it doesn't leave the trunk."""
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, SinglePass))
    if isinstance(output, ModelOutput) and isinstance(output.get("past_key_values"), SinglePass):
        output["past_key_values"] = None
    return output


def _check_positions(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Nodes number a row's columns themselves, one after another, so nothing else may be asked for.

    Where numbering starts doesn't matter: attention sees differences. Columns of padding don't matter either.
    """
    if position_ids is None:
        return
    wrong = position_ids[..., 1:] - position_ids[..., :-1] != 1
    if mask is not None:
        new = mask[:, -position_ids.shape[-1] :].bool().to(wrong.device)
        wrong = wrong & new[:, 1:] & new[:, :-1]
    if bool(wrong.any()):
        raise ValueError("position_ids have to count up by one: blocks in a swarm number the tokens themselves")


def _trunk_of(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that has the empty list of layers, and the list's name in it."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in _LAYER_LISTS and isinstance(module, nn.ModuleList) and len(module) == 0:
            return model.get_submodule(path.rpartition(".")[0]), name
    raise ModelError(f"{type(model).__name__} has no list of layers to put the swarm in; this family isn't supported")


def _drop_position_biases(trunk: nn.Module) -> None:
    """ALiBi families make the bias for all layers in their trunk. The blocks' nodes make their own."""
    if hasattr(trunk, "use_alibi"):  # Falcon
        trunk.__dict__["use_alibi"] = False
    if hasattr(trunk, "build_alibi_tensor"):  # BLOOM; without a mask it goes by the cache's get_mask_sizes
        trunk.__dict__["build_alibi_tensor"] = _no_biases


def _no_biases(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def _expects_tuple(trunk: nn.Module, stack: StackOfBlocks) -> bool:
    """Whether the family's loop takes ``outputs[0]`` of what a layer returns, or the whole.

    Tried with two rows, of which a loop of the wrong kind would leave one.
    """
    ids = torch.zeros(2, 1, dtype=torch.int64, device=next(trunk.parameters()).device)
    for gives_tuple in (False, True):
        stack.gives_tuple = gives_tuple
        try:
            with torch.no_grad():
                hidden = trunk(ids, past_key_values=Echo(), use_cache=False)[0]
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, StopIteration):
            continue
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (2, 1):
            return gives_tuple
    raise ModelError(f"{type(trunk).__name__} calls its layers in a way that isn't known; this family isn't supported")
