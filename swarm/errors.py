"""Every error the product raises, as one tree with one root. ``swarm/wire/error_text.py`` has their form on the wire.

========================== ========= ===============================================================================
Class                      Owner     Means
========================== ========= ===============================================================================
SwarmError                 node      the root
  UsageError               caller    what was asked for can't work
    ModelError             caller    the model can't be used
    ConnectError           network   no peer can be reached, or the own address is taken
    LockedError            caller    the swarm has a key that this process hasn't
    InputError             caller    found before anything is sent: not finite, wrong shape, too long (a ValueError)
    SessionInUseError      caller    a session is used by two threads at once
  MissingBlocksError       network   no node that can be used serves some of the blocks
  DaemonError              machine   this process's own network daemon is gone
  RemoteError              node      a peer failed, or answered with an error
    BadRequestError        caller    a peer refused a message
      NotServedError       node      a peer doesn't serve what its record says
      OutOfOrderError      nobody    a step came before one that comes ahead of it
      MalformedError       node      found here in what a peer sent
    OutOfCacheError        nobody    a peer has no KV cache left
    EvictedError           nobody    a peer gave an idle session's cache to others
    LeavingError           node      a peer is shutting down
    PeerLostError          network   a peer can't be reached, its stream ended, or it stopped answering
========================== ========= ===============================================================================

The owner says what a client does about an error (``client/session/failures.py``): a peer is left out for a while only
for errors of the node or of the network to it; the caller's are raised as they are.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence


class Owner(enum.Enum):
    """Whose an error is: who has to do something about it."""

    CALLER = "caller"
    NODE = "node"
    NETWORK = "network"
    MACHINE = "machine"
    NOBODY = "nobody"


class SwarmError(Exception):
    """Root of all errors of this project. ``str(error)`` is one line that says what to do."""

    code = "error"
    owner = Owner.NODE


class UsageError(SwarmError):
    """The user's input can't work: unknown model, bad block range, wrong dtype. Commands exit with code 2."""

    code = "usage"
    owner = Owner.CALLER


class ModelError(UsageError):
    """The model can't be used: not found, no weights, a tensor is missing, an architecture that isn't known."""

    code = "model"


class ConnectError(UsageError):
    """No peer could be reached, or the own address is taken."""

    code = "connect"
    owner = Owner.NETWORK


class LockedError(UsageError):
    """The swarm is locked, and this process hasn't its key, or has one though the swarm is open."""

    code = "locked"


class InputError(UsageError, ValueError):
    """Tensors that no node would take: not finite, of another shape or dtype, too long. Nothing was sent."""


class SessionInUseError(UsageError):
    """A session was used while another thread is using it."""


class MissingBlocksError(SwarmError):
    """No node that can be used serves some of the model's blocks. The text says what was seen of those that do.

    Attributes:
        blocks: indices of the blocks that nobody serves.
    """

    code = "missing_blocks"
    owner = Owner.NETWORK

    def __init__(self, message: str, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)


class DaemonError(SwarmError):
    """This process's own network daemon is gone, so that no peer can be reached."""

    code = "daemon"
    owner = Owner.MACHINE


class RemoteError(SwarmError):
    """A peer failed or answered with an error."""

    code = "remote"


class BadRequestError(RemoteError):
    """The peer refused a message as malformed: wrong shape, dtype, size, position or block."""

    code = "bad_request"
    owner = Owner.CALLER


class MalformedError(BadRequestError):
    """What a peer sent can't be read. To that peer it is a :class:`BadRequestError`."""

    owner = Owner.NODE


class NotServedError(BadRequestError):
    """The peer doesn't serve these blocks, or this adapter: it has moved since its record was read."""

    code = "not_served"
    owner = Owner.NODE


class OutOfOrderError(BadRequestError):
    """A step came before one that comes ahead of it, which was lost or overtaken on its way. The session has ended."""

    code = "out_of_order"
    owner = Owner.NOBODY


class OutOfCacheError(RemoteError):
    """The peer has no KV cache left for this step. Others may have."""

    code = "out_of_cache"
    owner = Owner.NOBODY


class LeavingError(RemoteError):
    """The peer is shutting down and takes no new sessions."""

    code = "leaving"


class EvictedError(RemoteError):
    """The peer has given the session's cache to others, as the session was idle. Nothing is wrong with the peer."""

    code = "evicted"
    owner = Owner.NOBODY


class PeerLostError(RemoteError):
    """The peer can't be reached, its stream ended, or it stopped answering."""

    code = "peer_lost"
    owner = Owner.NETWORK
