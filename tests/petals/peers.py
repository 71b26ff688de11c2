"""Petals' servers and Petals clients, as processes of their own environment."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-petals" / "bin" / "python"
START_TIMEOUT = 60.0
ANSWER_TIMEOUT = 120.0
SKIP = "SWARM_SKIP_PETALS"

T = TypeVar("T", bound="Server | Client")


def install() -> None:
    """Makes Petals' environment if it isn't there. It never just goes without: that must be said by ``SKIP``."""
    if os.environ.get(SKIP):
        pytest.skip(f"{SKIP} is set")
    setup = subprocess.run([ROOT / "scripts" / "petals" / "setup.sh"], stderr=subprocess.PIPE, text=True)
    assert setup.returncode == 0, setup.stderr


def environment() -> dict[str, str]:
    """For Petals' processes: it is to look at neither its dependencies' versions nor the internet."""
    offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return {**os.environ, **offline, "PETALS_IGNORE_DEPENDENCY_VERSION": "1", "OMP_NUM_THREADS": "1"}


class Lines:
    """JSON by the line, to and from another process."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer

    def send(self, order: dict[str, Any]) -> None:
        """Gives an order."""
        self._writer.write(json.dumps(order).encode() + b"\n")
        self._writer.flush()

    def receive(self, timeout: float = ANSWER_TIMEOUT) -> Any:
        """Its next answer.

        Raises:
            TimeoutError: there is none within ``timeout`` seconds, or the process has ended.
        """
        ready, _, _ = select.select([self._reader], [], [], timeout)
        line = self._reader.readline() if ready else b""
        if not line:
            raise TimeoutError(f"no answer in {timeout:.0f} s")
        return json.loads(line)

    def close(self) -> None:
        """Closes both directions."""
        self._reader.close()
        with contextlib.suppress(BrokenPipeError):
            self._writer.close()


class Client:
    """An unmodified Petals client with one model; see :mod:`tests.petals.driver`."""

    def __init__(self, pid: int, lines: Lines, log: Path) -> None:
        self._pid, self._lines, self._log = pid, lines, log

    def ask(self, do: str, *, timeout: float = ANSWER_TIMEOUT, **order: Any) -> Any:
        """Gives an order; its result.

        Raises:
            TimeoutError: there is none within ``timeout`` seconds.
        """
        self._lines.send({"do": do, **order})
        try:
            answer = self._lines.receive(timeout)
        except TimeoutError as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGUSR1)
            time.sleep(1)  # until it has said where it hangs
            raise TimeoutError(f"{do}: {error}\n{self._log.read_text()[-8000:]}") from error
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def fail_when(self, meanwhile: Callable[[list[str]], None], **order: Any) -> str:
        """Generates, with a pause for ``meanwhile``, which is given the PeerIDs of the hops; the error that follows."""
        self._lines.send({"do": "generate", **order})
        meanwhile(self._lines.receive()["paused"])
        self._lines.send({})
        answer = self._lines.receive()
        assert "error" in answer, "it did not fail"
        return str(answer["error"])

    def close(self) -> None:
        """Ends it, and the processes that it has started."""
        kill_group(self._pid)
        self._lines.close()


class Server:
    """A Petals server."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    def wait_ready(self) -> None:
        """Waits until it serves.

        Raises:
            TimeoutError: it doesn't in ``START_TIMEOUT``.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while "Started" not in self._text():
            assert self.alive, f"the Petals server has ended:\n{self._text()[-4000:]}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"no Petals server in {START_TIMEOUT:.0f} s:\n{self._text()[-4000:]}")
            time.sleep(0.05)

    @property
    def address(self) -> str:
        """Where it is reached."""
        found = re.search(r"Running a server on (\[.*\])", self._text())
        assert found is not None
        return str(ast.literal_eval(found[1])[0])

    @property
    def peer_id(self) -> str:
        """Its name in the swarm."""
        return self.address.rpartition("/")[2]

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return Path(f"/proc/{self.pid}").exists()

    def close(self) -> None:
        """kill -9, its children too."""
        kill_group(self.pid)

    def _text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Petals:
    """Starts Petals' servers and clients; see :mod:`tests.petals.zygote`."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        with (workdir / "zygote.log").open("w") as stderr:
            self._process = subprocess.Popen(
                [PYTHON, "-W", "ignore", Path(__file__).parent / "zygote.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(),
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._zygote = Lines(self._process.stdout, self._process.stdin)
        self._started = 0
        self._running: list[Server | Client] = []

    def server(self, model: Path, prefix: str, blocks: str, initial_peers: Sequence[str] = (), *options: str) -> Server:
        """A server for these blocks that is up.

        It has one handler: with more of them, one that has not heard of a session yet drops what is pushed to it.
        """
        argv = [str(model), "--dht_prefix", prefix, "--block_indices", blocks, "--torch_dtype", "float32"]
        argv += ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", "10", "--num_handlers", "1"]
        argv += ["--identity_path", str(self._workdir / f"{self._started}.id")]
        argv += ["--no_auto_relay", "--skip_reachability_check"]
        argv += ["--initial_peers", *initial_peers] if initial_peers else ["--new_swarm"]

        def start() -> Server:
            pid, log = self._fork("server", [*argv, *options])
            server = Server(pid, log)
            try:
                server.wait_ready()
            except TimeoutError:
                server.close()
                raise
            return server

        return self._insist(start)

    def client(self, model: Path, prefix: str, initial_peers: Sequence[str], **options: Any) -> Client:
        """A client that has connected."""

        def start() -> Client:
            # not in the working directory: the path of a socket must be short
            with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
                address = str(Path(folder) / "orders")
                listener.bind(address)
                listener.listen()
                listener.settimeout(START_TIMEOUT)
                pid, log = self._fork("client", address)
                connection, _ = listener.accept()
            with connection:
                client = Client(pid, Lines(connection.makefile("rb"), connection.makefile("wb")), log)
            order = {"path": str(model), "initial_peers": list(initial_peers), "dht_prefix": prefix, **options}
            try:
                client.ask("connect", timeout=START_TIMEOUT, **order)
            except TimeoutError:
                client.close()
                raise
            return client

        return self._insist(start)

    def _fork(self, what: str, argument: Any) -> tuple[int, Path]:
        log = self._workdir / f"{what}-{self._started}.log"
        self._started += 1
        self._zygote.send({what: argument, "log": str(log)})
        return int(self._zygote.receive()), log

    def _insist(self, start: Callable[[], T]) -> T:
        """What is started, with one more try if it hangs: servers of Petals' fork with threads running, too."""
        try:
            started = start()
        except TimeoutError as error:
            warnings.warn(f"Petals hung while it started, and is started again: {error}", stacklevel=3)
            started = start()
        self._running.append(started)
        return started

    def close(self) -> None:
        """Ends all of them."""
        for started in self._running:
            started.close()
        kill_group(self._process.pid)
        self._process.wait()
        self._zygote.close()


def kill_group(pid: int) -> None:
    """kill -9 for a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """``thing``, closed at the end."""
    try:
        yield thing
    finally:
        thing.close()
