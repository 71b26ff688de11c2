"""Finding out how a block uses attention by running it once, without weights, over a function that only looks.

This takes the place of a table of families: the shapes of the caches are what the block hands over, and a block
that can't run over our attention function is refused before any weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compat.attention import HARMLESS, UNDERSTOOD, register_attention
from ..compat.caches import MixerStates
from ..errors import ModelError
from .families import Family
from .families.mixers import Mixer

PROBE = "swarm_probe"

SharedKV = dict[Any, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values that some blocks leave for later ones, by the name that transformers' modules give them."""

_STATES_ONLY = {"linear_attention", "mamba"}  # types of layers that have no attention


@dataclass(frozen=True)
class KVGeometry:
    """The KV cache of one block: ``[kv_heads, tokens, key_dim]`` and ``[kv_heads, tokens, value_dim]``, or, if
    ``shared``, only the former, which is both."""

    kv_heads: int
    key_dim: int
    value_dim: int
    shared: bool = False

    @property
    def elements(self) -> int:
        """Numbers that are kept of one token."""
        return self.kv_heads * (self.key_dim + (0 if self.shared else self.value_dim))


@dataclass(frozen=True)
class BlockCache:
    """What one block keeps: keys and values of each token (or None), and ``state_bytes`` for each row.

    ``borrows``: it attends over the keys and values of another block, which have the shape ``kv``.
    """

    kv: KVGeometry | None
    state_bytes: int
    borrows: bool = False

    def bytes(self, *, tokens: int, rows: int, itemsize: int) -> int:
        """Memory for ``tokens`` tokens, in a dtype of ``itemsize`` bytes, and the states of ``rows`` rows."""
        per_token = self.kv.elements * itemsize if self.kv and not self.borrows else 0
        return per_token * tokens + self.state_bytes * rows


class _Observer:
    """Stands where the engine's batch would be, and sees what the block keeps there.

    ``shared_kv``: what blocks before it left there for it, as in a batch.
    """

    def __init__(self, shared_kv: SharedKV) -> None:
        self.shared_kv = shared_kv
        self._borrowed = list(shared_kv.values())
        self.borrows = False
        self.kv: KVGeometry | None = None
        self.wrong = ""
        self.state_bytes = 0

    def attends(
        self, module: nn.Module, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        unknown = [
            name
            for name, given in options.items()
            if given is not None and name not in UNDERSTOOD and name not in HARMLESS
        ]
        if self.kv is not None:
            self.wrong = "attends more than once in each block"
        elif getattr(module, "is_causal", True) is False:
            self.wrong = "attends to later tokens, too"
        elif mask is not None:
            self.wrong = "makes an attention mask of its own"
        elif unknown:
            self.wrong = f"needs {', '.join(unknown)} in attention"
        self.borrows = any(key is other for other, _ in self._borrowed)
        self.kv = KVGeometry(key.shape[1], key.shape[3], value.shape[3], key is value)

    def mix(self, block: int, hidden: torch.Tensor, mixer: Mixer) -> torch.Tensor:
        states = MixerStates()
        output = mixer(hidden, states)
        if states.recurrent and not _continues(mixer, hidden, states):
            self.wrong = "forgets its recurrent state where a prompt is cut into chunks"
        kept = [*states.conv.values(), *states.recurrent.values()]
        self.state_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        return output


def _continues(mixer: Mixer, hidden: torch.Tensor, states: MixerStates) -> bool:
    """Whether several tokens go on from a recurrent state. Some modules of transformers do so for one token only, and
    start anew otherwise: they don't mind a state that is of an impossible shape."""
    several = hidden.expand(1, 2, -1)
    mixer(several, MixerStates(dict(states.conv), dict(states.recurrent)))
    impossible = {index: state.new_empty(1, *(13,) * (state.dim() - 1)) for index, state in states.recurrent.items()}
    try:
        mixer(several, MixerStates(dict(states.conv), impossible))
    except (RuntimeError, ValueError, IndexError):
        return True
    return False


def _look(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    batch: _Observer | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if batch is None:
        raise TypeError("its keywords don't reach its attention")
    batch.attends(module, key, value, attention_mask, options)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


register_attention(PROBE, _look)


def unserved(model_type: str, why: str) -> ModelError:
    """The error for a model that nodes can't serve."""
    return ModelError(
        f"models of type {model_type!r} can't be served yet: {why}. "
        "docs/models.md lists those that can, docs/adding-a-model.md says how one is added"
    )


def probe_block(
    family: Family,
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    embeddings: Any,
    *,
    kind: str,
    model_type: str,
    shared_kv: SharedKV,
) -> BlockCache:
    """What a block on the meta device keeps; its config names :data:`PROBE` as its attention. ``kind`` is its type of
    layer, ``model_type`` for the error's text. ``shared_kv`` goes from each block to the next, empty at first.

    Raises:
        ModelError: the block can't run over our attention function.
    """
    seen, name, failure = _Observer(shared_kv), type(block).__name__, ""
    try:
        family.run(block, hidden, positions, embeddings, batch=seen)
    except (NotImplementedError, RuntimeError) as error:
        # Once all has been seen, this is what can't run without weights: which experts a token goes to, for one.
        if seen.kv is None and not seen.state_bytes:
            failure = f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever an unsuited block makes of these arguments
        failure = f"{type(error).__name__}: {error}"
    if failure:
        raise unserved(model_type, f"{name} wants to be called in another way ({failure})")
    if seen.wrong:
        raise unserved(model_type, f"{name} {seen.wrong}")
    if seen.kv is None and not (kind in _STATES_ONLY and seen.state_bytes):
        raise unserved(model_type, f"the attention of {name} does not go through transformers' interface")
    return BlockCache(seen.kv, seen.state_bytes, seen.borrows)
