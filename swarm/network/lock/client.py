"""The lock of a private swarm, between hivemind and the network daemon: all that peers ask of each other passes here.

On the daemon there are only this module's four names. So a stranger, whom the daemon tells what a peer understands,
doesn't see what it serves, and no handler needs to know of the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakSet

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
from hivemind.utils.asyncio import cancel_task_if_running

from ..calls import look_at
from .gate import LOCKED, SESSION_SECONDS, SHUT_OUT, WELCOME, Gate
from .handshake import NONCE_BYTES, Meeting, caller_proofs, derive, key_of_answer, new_nonce
from .key import SwarmKey
from .sealed import OVERHEAD, Calling, NotSealedError
from .shut_out import ShutOut

HELLO, PROVE, CALL, STREAM = "swarm.lock.hello", "swarm.lock.prove", "swarm.lock.call", "swarm.lock.stream"
_OF_THE_DAEMON = "/libp2p/"  # protocols that it has itself, such as that of relays
_OK, _FAILED = b"\x00", b"\x01"  # how a sealed answer begins
_RENEW_SECONDS = SESSION_SECONDS - 600.0
_MEET_SECONDS = 10.0
_DENIED_SECONDS = 5.0  # for which a peer isn't asked again that has refused
_MAX_NAME_BYTES = 255
_MAX_OPENING = 2 + _MAX_NAME_BYTES + OVERHEAD
_MAX_STRANGERS = 64  # that open streams at a time
_LOOK_SECONDS = 1.0

Unary = Callable[[bytes, PeerID], Awaitable[bytes]]
Stream = Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Opened = tuple[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter]


class DeniedError(P2PHandlerError):
    """A peer doesn't take us for a member, or isn't one."""


class LockedClient(Client):
    """What hivemind's ``P2P`` has as its connection to the daemon, with a lock. Made by :func:`lock`.

    Attributes:
        refused: how often peers were turned away, by why.
        denied: why a peer has turned this one away, the last time.
    """

    def __init__(self, control: object, me: PeerID, keys: Sequence[SwarmKey], shut_out: ShutOut) -> None:
        super().__init__(_initialized_with_create=True)
        self.control = control
        self._me, self._keys, self._shut_out = me, keys, shut_out
        self._gate = Gate(me.to_bytes(), keys, lambda peer: bool(shut_out) and shut_out.has(PeerID(peer).to_base58()))
        self.refused = self._gate.refused
        self.denied: str | None = None
        self._unary: dict[str, Unary] = {}
        self._streams: dict[str, Stream] = {}
        self._registered: set[str] = set()
        self._sessions: dict[PeerID, tuple[Calling, float]] = {}
        self._meetings: dict[PeerID, asyncio.Task[Calling]] = {}
        self._denials: dict[PeerID, tuple[DeniedError, float]] = {}
        self._strangers = 0
        self._open: dict[PeerID, WeakSet[asyncio.StreamWriter]] = {}
        self._watching: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Ends the connection to the daemon."""
        for task in (self._watching, *self._meetings.values()):
            cancel_task_if_running(task)
        super().close()

    # Serving

    async def add_unary_handler(self, proto: str, handler: Unary, balanced: bool = False) -> None:
        """As ``Client``'s, for members."""
        if proto in self._unary:
            raise P2PDaemonError(f"Handler for protocol {proto} already registered")
        self._unary[proto] = handler
        await self.open_gate()
        await self._register(CALL, lambda: super(LockedClient, self).add_unary_handler(CALL, self._take_call))

    async def remove_unary_handler(self, proto: str) -> None:
        """As ``Client``'s."""
        if self._unary.pop(proto, None) is None:
            raise P2PDaemonError(f"Handler for protocol {proto} is not registered")

    async def stream_handler(self, proto: str, handler_cb: Stream, balanced: bool = False) -> None:
        """As ``Client``'s, for members."""
        self._streams[proto] = handler_cb
        await self.open_gate()
        await self._register(STREAM, lambda: super(LockedClient, self).stream_handler(STREAM, self._take_stream))

    async def remove_stream_handler(self, proto: str) -> None:
        """As ``Client``'s."""
        del self._streams[proto]

    async def open_gate(self) -> None:
        """Starts to answer challenges, as with the first handler."""

        async def hello(message: bytes, caller: PeerID) -> bytes:
            return self._gate.hello(caller.to_bytes(), message)

        async def prove(message: bytes, caller: PeerID) -> bytes:
            return self._gate.prove(caller.to_bytes(), message)

        await self._register(HELLO, lambda: super(LockedClient, self).add_unary_handler(HELLO, hello))
        await self._register(PROVE, lambda: super(LockedClient, self).add_unary_handler(PROVE, prove))

    async def _register(self, name: str, register: Callable[[], Awaitable[None]]) -> None:
        if name not in self._registered:
            self._registered.add(name)
            await register()

    async def _take_call(self, message: bytes, caller: PeerID) -> bytes:
        session = self._gate.find(caller.to_bytes(), message)
        if session is None:
            return LOCKED
        try:
            number, said = session.request(b"call", message)
            name, data = _split(said)
        except NotSealedError:
            return LOCKED
        handler = self._unary.get(name)
        try:
            if handler is None:
                raise P2PDaemonError(f"protocols not supported: [{name}]")
            answer = _OK + await handler(data, caller)
        except Exception as error:
            answer = _FAILED + repr(error).encode()
        return WELCOME + session.answer(b"call", number, answer)

    async def _take_stream(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler, name = await self._let_in(info.peer_id, reader, writer)
        if handler is None:
            writer.close()
            return
        self._note(info.peer_id, writer)
        await handler(StreamInfo(info.peer_id, info.addr, name), reader, writer)

    async def _let_in(
        self, caller: PeerID, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Stream | None, str]:
        """Which handler a member's stream is for; a stranger's has none."""
        stranger = not self._gate.knows(caller.to_bytes())
        if stranger and self._strangers >= _MAX_STRANGERS:
            return None, ""
        self._strangers += stranger
        try:
            message = await asyncio.wait_for(_read(reader, _MAX_OPENING), _MEET_SECONDS)
            session = self._gate.find(caller.to_bytes(), message)
            if session is None:
                raise NotSealedError
            number, said = session.request(b"stream", message)
            name, _ = _split(said)
        except (NotSealedError, OSError, EOFError, asyncio.TimeoutError):
            writer.write(_frame(LOCKED))
            return None, ""
        finally:
            self._strangers -= stranger
        handler = self._streams.get(name)
        status = _OK if handler is not None else _FAILED + f"protocols not supported: [{name}]".encode()
        writer.write(_frame(WELCOME + session.answer(b"stream", number, status)))
        return handler, name

    # Asking

    async def call_unary_handler(self, peer_id: PeerID, proto: str, data: bytes) -> bytes:
        """As ``Client``'s, for members.

        Raises:
            DeniedError: this peer or the other one is no member.
        """
        for _ in range(2):
            session = await self._session(peer_id)
            number, message = session.request(b"call", _join(proto, data))
            answer = await super().call_unary_handler(peer_id, CALL, message)
            if answer[:1] == WELCOME:
                return _open(session, b"call", number, answer[1:])
            self._forget(peer_id, session)  # the peer was started again and doesn't know us any more
        raise self._deny(peer_id, "the peer forgets at once that it has let this one in")

    async def stream_open(self, peer_id: PeerID, protocols: Sequence[str]) -> Opened:
        """As ``Client``'s, for members. Nothing is sent before the peer has shown that it is one.

        Raises:
            DeniedError: this peer or the other one is no member.
        """
        (proto,) = protocols
        if proto.startswith(_OF_THE_DAEMON):
            return await super().stream_open(peer_id, protocols)
        for _ in range(2):
            session = await self._session(peer_id)
            number, message = session.request(b"stream", _join(proto, b""))
            info, reader, writer = await super().stream_open(peer_id, (STREAM,))
            try:
                writer.write(_frame(message))
                answer = await asyncio.wait_for(_read(reader, 2**12), _MEET_SECONDS)
                if answer[:1] == WELCOME:
                    _open(session, b"stream", number, answer[1:])
                    self._note(peer_id, writer)
                    return StreamInfo(info.peer_id, info.addr, proto), reader, writer
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                writer.close()
                raise P2PDaemonError("the peer closed the stream at once") from error
            except BaseException:
                writer.close()
                raise
            writer.close()
            self._forget(peer_id, session)
        raise self._deny(peer_id, "the peer forgets at once that it has let this one in")

    async def _session(self, peer_id: PeerID) -> Calling:
        if self._shut_out and self._shut_out.has(peer_id.to_base58()):
            raise DeniedError(f"{peer_id} is shut out here")
        session, until = self._sessions.get(peer_id, (None, 0.0))
        if session is not None and time.monotonic() < until:
            return session
        denial, until = self._denials.get(peer_id, (None, 0.0))
        if denial is not None and time.monotonic() < until:
            raise denial
        meeting = self._meetings.get(peer_id)
        if meeting is None:
            meeting = self._meetings[peer_id] = asyncio.ensure_future(self._meet(peer_id))
            meeting.add_done_callback(lambda _: self._meetings.pop(peer_id))
            meeting.add_done_callback(look_at)
        return await asyncio.shield(meeting)

    async def _meet(self, peer_id: PeerID) -> Calling:
        nonce = new_nonce()
        try:
            challenge = await self._ask(peer_id, HELLO, WELCOME + nonce)
        except Exception as error:
            if "not supported" in str(error):
                raise self._deny(peer_id, "this swarm is open: leave out the key") from error
            raise
        if challenge[:1] == SHUT_OUT:
            raise self._deny(peer_id, "this peer was shut out of the swarm")
        if challenge[:1] != WELCOME or len(challenge) != 1 + NONCE_BYTES:
            raise self._deny(peer_id, "the peer's lock is of another version")
        meeting = Meeting(self._me.to_bytes(), peer_id.to_bytes(), nonce, challenge[1:])
        answer = await self._ask(peer_id, PROVE, caller_proofs(self._keys, meeting))
        key = key_of_answer(answer[1:], self._keys, meeting) if answer[:1] == WELCOME else None
        if key is None:
            raise self._deny(peer_id, "this is not the key of this swarm: ask its owner for the key or an invitation")
        session = Calling(derive(key, meeting))
        self._sessions[peer_id] = session, time.monotonic() + _RENEW_SECONDS
        self._denials.pop(peer_id, None)
        return session

    async def _ask(self, peer_id: PeerID, name: str, message: bytes) -> bytes:
        return await asyncio.wait_for(super().call_unary_handler(peer_id, name, message), _MEET_SECONDS)

    def _deny(self, peer_id: PeerID, why: str) -> DeniedError:
        self.denied, denial = why, DeniedError(why)
        now = time.monotonic()
        self._denials = {peer: kept for peer, kept in self._denials.items() if kept[1] > now}
        self._denials[peer_id] = denial, now + _DENIED_SECONDS
        return denial

    def _forget(self, peer_id: PeerID, session: Calling) -> None:
        if self._sessions.get(peer_id, (None, 0.0))[0] is session:
            del self._sessions[peer_id]

    # Shutting out

    def _note(self, peer_id: PeerID, writer: asyncio.StreamWriter) -> None:
        """A stream that ends when the peer is shut out."""
        if not self._shut_out:
            return
        self._open.setdefault(peer_id, WeakSet()).add(writer)
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._open = {peer: writers for peer, writers in self._open.items() if writers}
            for peer, writers in self._open.items():
                if self._shut_out.has(peer.to_base58()):
                    for writer in [*writers]:
                        writer.close()


def lock(p2p: P2P, keys: Sequence[SwarmKey], shut_out: ShutOut) -> LockedClient:
    """From now on ``p2p`` speaks with members only. It has no handlers yet."""
    client = p2p._client
    assert client is not None
    locked = LockedClient(client.control, p2p.peer_id, keys, shut_out)
    client.control = None  # or it would be closed with the object that goes
    p2p._client = locked
    return locked


async def is_locked(p2p: P2P, peer_id: PeerID, timeout: float) -> bool:
    """Whether a peer has a lock, for one without a key that it didn't answer."""
    with contextlib.suppress(Exception):
        answer = await asyncio.wait_for(p2p._client.call_unary_handler(peer_id, HELLO, b""), timeout)
        return answer[:1] in (LOCKED, SHUT_OUT)
    return False


def _open(session: Calling, kind: bytes, number: int, sealed: bytes) -> bytes:
    try:
        said = session.answer(kind, number, sealed)
    except NotSealedError:
        raise DeniedError("the answer comes from somebody else") from None
    if said[:1] != _OK:
        raise P2PHandlerError(said[1:].decode(errors="replace"))
    return said[1:]


def _join(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return bytes([len(encoded)]) + encoded + data


def _split(said: bytes) -> tuple[str, bytes]:
    end = 1 + int.from_bytes(said[:1], "big")
    try:
        return said[1:end].decode(), said[end:]
    except UnicodeDecodeError:
        raise NotSealedError from None


def _frame(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


async def _read(reader: asyncio.StreamReader, most: int) -> bytes:
    size = int.from_bytes(await reader.readexactly(2), "big")
    if size > most:
        raise NotSealedError
    return await reader.readexactly(size)
