"""What ``from_pretrained`` takes, in the forms that transformers takes it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from swarm.errors import UsageError
from swarm.network.lock.invitation import read_invitation
from swarm.network.options import KeyOptions

from ..settings import ClientSettings


def peers_of(initial_peers: object) -> tuple[str, ...]:
    """Addresses, of which a single one need not be in a list; whatever they are (strings, multiaddrs), as text."""
    several = isinstance(initial_peers, Iterable) and not isinstance(initial_peers, str | bytes)
    return tuple(map(str, initial_peers)) if several else (str(initial_peers),)  # type: ignore[call-overload]


def key_of(swarm_key: Any, join: str | None) -> KeyOptions:
    """The key of a locked swarm, or several, each as :attr:`KeyOptions.swarm_key` has it; and an invitation.

    Raises:
        UsageError: ``join`` is no invitation.
    """
    several = swarm_key if isinstance(swarm_key, list | tuple) else (swarm_key,)
    keys = tuple(key for key in several if key is not None)
    return KeyOptions(swarm_key=keys, join=None if join is None else read_invitation(join))


def dtype_of(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> str | torch.dtype:
    """``"bfloat16"`` as torch's; ``"auto"``, and no dtype, as what ``load_ends`` calls it.

    Raises:
        UsageError: there is no such dtype, or two are given.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise UsageError(f"torch_dtype is the old name of dtype: got {torch_dtype} and {dtype}")
    chosen = torch_dtype if dtype is None else dtype
    if isinstance(chosen, torch.dtype):
        return chosen
    if chosen is None or chosen == "auto":
        return "checkpoint"
    found = getattr(torch, str(chosen).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype is 'auto', 'float32', 'bfloat16' or 'float16', not {chosen!r}")
    return found


def device_of(device_map: Any) -> torch.device:
    """Where the two ends go: a device, or transformers' ``{"": device}``; ``"auto"`` is a GPU if there is one.

    Raises:
        UsageError: it is no device, or there are several.
    """
    chosen = device_map
    if isinstance(device_map, Mapping) and len(set(device_map.values())) == 1:
        chosen = next(iter(device_map.values()))
    if chosen is None:
        return torch.device("cpu")
    if isinstance(chosen, str) and chosen in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(chosen)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"device_map is one device for the two ends of the model, such as 'cpu' or 'cuda:0', or 'auto'; "
            f"got {device_map!r}. Where the blocks are computed is up to the nodes"
        ) from error


def settings_of(given: Mapping[str, Any]) -> ClientSettings:
    """
    Raises:
        TypeError: some of them aren't fields of :class:`ClientSettings`.
        UsageError: a value can't be.
    """
    known = [field.name for field in dataclasses.fields(ClientSettings)]
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(
            f"from_pretrained() has no argument {', '.join(unknown)}: how blocks are loaded is up to the nodes. "
            f"Beyond those in its docstring it takes {', '.join(known)}"
        )
    return ClientSettings(**given)
