"""What a session's cache is asked for with: by the client at the node that is to have it, and by that node at the one
that has it. Whoever shows the key that the client gave when it opened the session may have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from hivemind.p2p import PeerID

from .fields import Natural, Number

HANDOVER = "rpc_handover"
KEY_BYTES = 16
Key = Annotated[bytes, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


@dataclass(frozen=True)
class TakeOver:
    """In the message that opens a session: where its beginning can be fetched.

    Attributes:
        columns: how many it is to have.
        reorders: how often the client knows the rows to have been reordered there: after one more, what is there is
            not what the client had.
        seconds: that the client is ready to wait for it.
    """

    peer_id: PeerID
    session_id: _Text
    key: Key
    columns: Natural
    reorders: Natural
    seconds: Number

    def to_dict(self) -> dict[str, object]:
        """As it stands in ``take_over``."""
        return vars(self) | {"peer_id": self.peer_id.to_base58()}


@dataclass(frozen=True)
class Fetch:
    """The metadata of ``rpc_handover``: columns of a session with these rows, the first ones.

    Attributes:
        dtype: name of that in which keys and values are kept.
    """

    session_id: _Text
    key: Key
    columns: Natural
    reorders: Natural
    left_padding: tuple[Natural, ...]
    adapter: _Text
    dtype: _Text
