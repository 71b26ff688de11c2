"""Puts the swarm where a family's own model has its list of layers.

The family's code keeps doing all else: embeddings and their scaling, final norm, output head, caps on logits, loss.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from swarm.compat.caches import HollowCache
from swarm.compat.keywords import ModelOutput, cache_keyword, cache_of, given_cache, take_cache, with_cache
from swarm.compat.trunk import INNER_OUTPUTS, OneLayer, find_trunk, strip_trunk, takes_tuple
from swarm.errors import ModelError
from swarm.model.families import family_of
from swarm.network.forks import refuse_fork

from .cache import SinglePass, SwarmCache
from .generating import current_generation
from .padding import left_padding_for_pass
from .remote_blocks import RemoteBlocks


class StackOfBlocks(nn.Module):
    """All blocks as one layer. What it is given as a cache says where they are (see :mod:`swarm.client.ends.cache`)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self._gives_tuple = False
        self._config, self._family = config, family_of(config.model_type)

    def give_tuple(self, answer: bool) -> None:
        """Whether to give back a tuple, as the layers of some families do."""
        self._gives_tuple = answer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        past = given_cache(kwargs)
        if past is None:
            past = next(given for given in args if isinstance(given, HollowCache))  # GPT-2
        hidden = self._family.unpack(past.run(self._family.pack(hidden_states, args)), self._config)
        return (hidden, None) if self._gives_tuple else hidden


class Echo(HollowCache):
    """Blocks that do nothing, to find out what a family's loop expects of a layer, or to run the ends alone."""

    def run(self, hidden: Tensor) -> Tensor:
        return hidden


def put_blocks_in(model: PreTrainedModel, blocks: RemoteBlocks) -> None:
    """Make ``blocks`` the layers of ``model``, whose own list of layers is empty.

    Raises:
        ModelError: the model's code is not of a shape that this can work with.
    """
    found = find_trunk(model)
    if found is None:
        raise ModelError(f"{type(model).__name__} has no list of layers to put the swarm in: it isn't supported")
    trunk, name = found
    family_of(model.config.model_type).adapt_trunk(trunk)
    stack = StackOfBlocks(model.config)
    setattr(trunk, name, OneLayer([stack]))
    strip_trunk(model, trunk)
    answer = takes_tuple(trunk, stack.give_tuple, Echo())
    if answer is None:
        raise ModelError(
            f"{type(trunk).__name__} calls its layers in a way that isn't known; this family isn't supported"
        )
    stack.give_tuple(answer)
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
        for flag in INNER_OUTPUTS:
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
        past, name = given_cache(kwargs), cache_keyword(type(trunk))
        if isinstance(past, Echo):
            return args, with_cache(kwargs, past, name)
        generation = current_generation()
        if past is None and kwargs.get("use_cache") and generation is not None and generation.cache.needed:
            past = generation.open_beside(self._blocks, columns)
        if isinstance(past, SwarmCache):
            past.begin(rows, columns, mask, ids if embeds is None else None)
            kwargs = with_cache(kwargs, past, name)
        else:
            if past is not None and past.get_seq_length() > 0:
                raise ValueError(f"the cache has to be a session's (session.cache), not {type(past).__name__}")
            if kwargs.get("use_cache"):
                raise ValueError(
                    "use_cache=True needs room on the nodes: "
                    f"with model.session(max_length=…) as session: model(…, {name}=session.cache)"
                )
            padding = left_padding_for_pass(mask, rows, columns)
            kwargs = {**with_cache(kwargs, SinglePass(self._blocks, padding), name), "use_cache": False}
        if columns > 1:
            _check_positions(kwargs.get("position_ids"), mask)
        return args, kwargs


def _note_wanted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the cache of how many columns logits will be made: ``generate()`` needs the last one's only. The cache may
    be given under any name that some version of transformers has for it."""
    past, kept = given_cache(kwargs), kwargs.get("logits_to_keep")
    if isinstance(past, SwarmCache):
        past.want(kept if isinstance(kept, int) and kept > 0 and kwargs.get("labels") is None else None)
    return args, with_cache(kwargs, past, cache_keyword(type(model)))


def _take_back_pass(trunk: nn.Module, args: Any, output: Any) -> Any:
    """A :class:`SinglePass` is no cache to go on with, so it doesn't leave the trunk."""
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, SinglePass))
    if isinstance(output, ModelOutput) and isinstance(cache_of(output), SinglePass):
        take_cache(output)
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
