"""The network daemon (p2pd) of a process: a child that is started again when it dies, under all that uses it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import P2P, P2PDaemonError
from hivemind.proto import crypto_pb2
from hivemind.utils.asyncio import cancel_task_if_running
from hivemind.utils.logging import loglevel, python_level_to_golog

from ..errors import DaemonError
from .calls import mend

logger = logging.getLogger(__name__)
_LEAVE_SESSION = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
# The daemon starts two relays, one with its options and one with limits of 2 minutes and 128 KiB. Which one serves is a
# race, lost half of the time, unless all of the daemon runs on one thread.
_ONE_THREAD = "import os, sys; os.environ['GOMAXPROCS'] = '1'; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
_RELAYS = "-forceReachabilityPublic=1"
_RELAY_LIMITS = ("-relayTimeLimit=87600h", f"-relayDataLimit={2**50}", "-relayMaxCircuits=1024")  # as good as none
_ATTEMPTS = 2
_STEADY_SECONDS = 5.0  # a daemon that dies sooner than that has not really started
_PAUSE_SECONDS = 1.0
_START_SECONDS = 30.0
_ANSWER_SECONDS = 2.0
_REJOIN_SECONDS = 2.0  # peers that are gone are asked for longer
_REJOINS: ContextVar[bool] = ContextVar("swarm_rejoins", default=False)  # what runs here finds the others again
_PORT = re.compile(r"/[^/]+/[^/]+/tcp/(\d+)(?!.*/p2p-circuit)")


class LastingP2P(P2P):
    """``P2P`` that outlives its daemon. While :meth:`keep` runs, a daemon that has died is started again under the same
    identity, at the same addresses, with the same handlers. Calls that were under way fail; later ones wait for it.

    The daemon is in a session of its own: a Ctrl-C in the terminal is for this process alone, which needs the daemon to
    say goodbye. The daemon still ends with this process, whichever way that ends.

    Attributes:
        restarts: how often the daemon was started again.
        lost: why it can't be started again, if it can't.
    """

    def __init__(self) -> None:
        super().__init__()
        self.restarts = 0
        self.lost: DaemonError | None = None
        self._settled = asyncio.Event()  # the daemon is up, or lost
        self._settled.set()
        self._args: list[str] = []
        self._key: tuple[Path, bytes] | None = None

    @classmethod
    async def create(cls, *args: Any, identity_path: str | None = None, **kwargs: Any) -> LastingP2P:
        """As ``P2P.create``. Without ``identity_path``, this object keeps the key that a daemon would make itself."""
        key = None
        if identity_path is None:
            key = Path(tempfile.gettempdir(), f"swarm-{os.urandom(8).hex()}", "key"), _make_key()
            identity_path, kwargs["check_if_identity_free"] = str(key[0]), False
        with _on_disk(key):
            p2p = await super().create(*args, identity_path=identity_path, **kwargs)
        assert isinstance(p2p, LastingP2P)
        p2p._key = key
        mend(p2p._client.control)
        return p2p

    @property
    def identity(self) -> bytes:
        """The key that was made for a daemon without ``identity_path``, as it stands in such a file."""
        return self._key[1] if self._key is not None else b""

    @property
    def is_up(self) -> bool:
        """Whether the daemon runs, as far as is known."""
        return self._settled.is_set() and self.lost is None

    async def keep(self, restarted: Callable[[], Awaitable[None]]) -> None:
        """Starts the daemon again whenever it has died, and runs ``restarted`` each time, which looks for the others.

        Ends when the daemon is lost: twice in a row it did not start, or died at once.
        """
        loop = asyncio.get_running_loop()
        failed, began, why = 0, -math.inf, ""  # why: it did not start
        telling: asyncio.Future[None] | None = None
        while True:
            listening = asyncio.ensure_future(self._end_deaf())
            try:
                code = await self._child.wait()
            finally:
                listening.cancel()
            self._break_off()
            cancel_task_if_running(telling)
            failed = failed + 1 if loop.time() - began < _STEADY_SECONDS else 0
            if failed == _ATTEMPTS:
                break
            logger.warning("the network daemon (p2pd) has ended with code %s: starting it again", code)
            try:
                await asyncio.sleep(_PAUSE_SECONDS * failed)
                await self._start_again(restart_args(self._args, () if why else self._visible_maddrs))
            except Exception as error:
                why = str(error) or repr(error)
            else:
                self.restarts, why = self.restarts + 1, ""
                telling = asyncio.ensure_future(self._rejoin(restarted))
            began = loop.time()
        self.lost = DaemonError(
            f"this process's network daemon (p2pd) has ended and can't be started again ({why or 'it ends at once'}), "
            "so no peer can be reached: start the process again"
        )
        self._settled.set()

    async def _end_deaf(self) -> None:
        """Ends a daemon that this process can't hear any more."""
        await asyncio.wait({self._client.control._read_task})
        await asyncio.sleep(_ANSWER_SECONDS)  # mostly it is the daemon that has ended
        logger.warning("the connection to the network daemon (p2pd) has broken: ending the daemon")
        with suppress(ProcessLookupError):
            self._child.kill()

    async def _rejoin(self, restarted: Callable[[], Awaitable[None]]) -> None:
        """Lets calls go on when ``restarted`` has found other peers again, of which the new daemon knows none yet: they
        would fail as if these peers were gone."""
        _REJOINS.set(True)
        rejoining = asyncio.ensure_future(restarted())
        try:
            await asyncio.wait({rejoining}, timeout=_REJOIN_SECONDS)
            self._settled.set()
            await rejoining
        finally:
            rejoining.cancel()

    async def check(self) -> None:
        """Waits until the daemon is up. Who knows that a call failed learns here whether that was the daemon's fault.

        Raises:
            DaemonError: the daemon is lost.
        """
        if self.is_up and not await self._answers():
            with suppress(asyncio.TimeoutError):  # it is just dying
                await asyncio.wait_for(self._child.wait(), _ANSWER_SECONDS)
                if self.lost is None:
                    self._settled.clear()
        await self._wait()

    async def shutdown(self) -> None:
        """Ends the daemon for good; :meth:`keep` has ended before."""
        self.lost = self.lost or DaemonError("the connection to the network was closed")
        self._settled.set()
        await super().shutdown()

    # All that is asked of other peers goes through these two.

    async def _call_unary_protobuf_handler(self, *args: Any, **kwargs: Any) -> Any:
        await self._wait()
        return await super()._call_unary_protobuf_handler(*args, **kwargs)

    async def call_binary_stream_handler(self, *args: Any, **kwargs: Any) -> Any:
        """As ``P2P``'s, once the daemon is up."""
        await self._wait()
        return await super().call_binary_stream_handler(*args, **kwargs)

    async def _wait(self) -> None:
        if self.lost is None and not _REJOINS.get():
            await self._settled.wait()
        if self.lost is not None:
            raise self.lost

    async def _answers(self) -> bool:
        try:
            await asyncio.wait_for(self._client.identify(), _ANSWER_SECONDS)
        except asyncio.TimeoutError:
            return True  # it is there, and slow
        except (OSError, asyncio.IncompleteReadError):
            return False
        return True

    def _make_process_args(self, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        self._args = [*P2P._make_process_args(*args, **kwargs), *_RELAY_LIMITS]
        return _detached(self._args)

    def _break_off(self) -> None:
        """The daemon is gone: ends what waits for its answers, which nothing else would."""
        self._settled.clear()
        control = self._client.control
        control.close()
        control._pending_messages = asyncio.Queue()
        for call in control._pending_calls.values():
            if not call.done():
                call.set_exception(P2PDaemonError("the network daemon has ended"))
        for task in control._handler_tasks.values():
            task.cancel()
        control._handler_tasks.clear()

    async def _start_again(self, args: Sequence[str]) -> None:
        """
        Raises:
            Exception: no daemon is there.
        """
        with suppress(FileNotFoundError):
            os.remove(self._daemon_listen_maddr["unix"])
        with _on_disk(self._key):
            self._child = await asyncio.create_subprocess_exec(
                *_detached(args),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={"GOLOG_LOG_LEVEL": python_level_to_golog(loglevel), **os.environ, "GOLOG_LOG_FMT": "json"},
            )
            try:
                await asyncio.wait_for(self._connect(), _START_SECONDS)
            except BaseException:
                with suppress(ProcessLookupError):
                    self._child.kill()
                await self._child.wait()
                raise

    async def _connect(self) -> None:
        """To a daemon that has just been started, for all that was registered with the one before."""
        ready = asyncio.get_running_loop().create_future()
        self._reader_task = asyncio.create_task(self._read_outputs(ready))  # the one before has come to its end
        await ready
        control = self._client.control
        await control._ensure_persistent_conn()
        mend(control)
        await self._ping_daemon()
        unary = dict(control.unary_handlers)
        for name, answer in unary.items():
            del control.unary_handlers[name]  # or it would be refused as registered already
            await control.add_unary_handler(name, answer)
        for name, handle in [*control.handlers.items()]:
            await control.stream_handler(name, handle)


def restart_args(args: Sequence[str], addresses: Sequence[object]) -> list[str]:
    """With what a daemon is started again that was started with ``args``, and was reached at ``addresses`` then.

    A port that it chose is asked for again. It must not bootstrap, as it would end if nobody answers.
    """
    port = next((found[1] for address in addresses if (found := _PORT.match(str(address)))), "0")
    kept = [arg for arg in args if not arg.startswith(("-b=", "-bootstrapPeers="))]
    return [re.sub(r"/tcp/0(?=,|$)", f"/tcp/{port}", arg) if arg.startswith("-hostAddrs=") else arg for arg in kept]


def _detached(args: Sequence[str]) -> list[str]:
    # the command leaves the session, and then becomes the daemon; hivemind lets nobody ask for start_new_session
    return [sys.executable, "-I", "-S", "-c", _ONE_THREAD if _RELAYS in args else _LEAVE_SESSION, *args]


def _make_key() -> bytes:
    key = Ed25519PrivateKey.generate()  # as the daemon does
    data = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=data).SerializeToString()


@contextmanager
def _on_disk(key: tuple[Path, bytes] | None) -> Iterator[None]:
    """Has a key where the daemon reads it, while it starts."""
    if key is None:
        yield
        return
    path, data = key
    path.parent.mkdir(mode=0o700)
    try:
        path.write_bytes(data)
        yield
    finally:
        shutil.rmtree(path.parent)
