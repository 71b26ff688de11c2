"""Why a peer can't be reached, in one line."""

from __future__ import annotations

import re

from hivemind.p2p import P2PHandlerError

from ..errors import PeerLostError, SwarmError
from ..wire.error_text import from_wire

_DIALED = re.compile(r"\[(/[^\]\s]+)\] ([^\n]*)")
_KNOWN = ("connection refused", "no route to host", "network is unreachable", "i/o timeout", "deadline exceeded")
_SHOWN = 4  # addresses


def describe_dialing(text: str) -> str:
    """What the network daemon says when it can't reach a peer, as ``"unreachable at ADDRESS (connection refused)"``."""
    dialed = {address: _reason(said) for address, said in _DIALED.findall(text)}
    if dialed:
        more = ", …" if len(dialed) > _SHOWN else ""
        return "unreachable at " + ", ".join(address + why for address, why in [*dialed.items()][:_SHOWN]) + more
    if "failed to find any peer" in text or "no addresses" in text or "not found" in text:
        return "unreachable: no address of it is known"
    return f"unreachable: {' '.join(text.split())[:200] or 'the network daemon does not say why'}"


def call_failed(error: BaseException) -> SwarmError:
    """The error of a call to a peer: what the peer answered, or why it can't be reached; an error of ours as it is."""
    if isinstance(error, SwarmError):
        return error
    if isinstance(error, P2PHandlerError):
        return from_wire(str(error))
    return PeerLostError(describe_dialing(str(error)))


def _reason(said: str) -> str:
    known = next((words for words in _KNOWN if words in said), "")
    return f" ({known})" if known else ""  # "dial backoff": it was tried a moment ago
