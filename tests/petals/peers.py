"""Petals' servers and a Petals client, as processes of their own environment."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-petals" / "bin" / "python"
START_TIMEOUT = 120.0
ANSWER_TIMEOUT = 120.0


def install() -> None:
    """Makes Petals' environment if it isn't there."""
    subprocess.run([ROOT / "scripts" / "petals" / "setup.sh"], check=True)


def environment() -> dict[str, str]:
    """For Petals' processes: it is to look at neither its dependencies' versions nor the internet."""
    offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return {**os.environ, **offline, "PETALS_IGNORE_DEPENDENCY_VERSION": "1", "OMP_NUM_THREADS": "1"}


class Script:
    """A script of this folder that runs in Petals' environment, and takes and gives JSON by the line."""

    def __init__(self, name: str, log: Path) -> None:
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [PYTHON, "-W", "ignore", Path(__file__).parent / name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(),
                start_new_session=True,
            )
        self._log = log

    def send(self, order: dict[str, Any]) -> None:
        """Gives an order."""
        _pipe(self._process.stdin).write(json.dumps(order).encode() + b"\n")
        _pipe(self._process.stdin).flush()

    def receive(self, timeout: float = ANSWER_TIMEOUT) -> Any:
        """Its next answer."""
        stdout = _pipe(self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], timeout)
        line = stdout.readline() if ready else b""
        if not line:
            raise AssertionError(f"no answer in {timeout:.0f} s:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends it, and the processes that it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()


class Client(Script):
    """An unmodified Petals client; see :mod:`tests.petals.driver`."""

    def __init__(self, log: Path) -> None:
        super().__init__("driver.py", log)

    def ask(self, do: str, **order: Any) -> Any:
        """Gives an order; its result."""
        self.send({"do": do, **order})
        return self.result()

    def result(self) -> Any:
        """The result of the last order."""
        answer = self.receive()
        assert "error" not in answer, answer["error"]
        return answer["result"]


class Server:
    """A Petals server."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    def wait_ready(self) -> None:
        """Waits until it serves."""
        deadline = time.monotonic() + START_TIMEOUT
        while "Started" not in self._text():
            if time.monotonic() > deadline or not self.alive:
                raise AssertionError(f"no Petals server:\n{self._text()[-4000:]}")
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

    def kill(self) -> None:
        """kill -9, its children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Servers:
    """Starts Petals' servers; see :mod:`tests.petals.zygote`."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._zygote = Script("zygote.py", workdir / "zygote.log")
        self._servers: list[Server] = []

    def start(self, model: Path, prefix: str, blocks: str, initial_peers: Sequence[str] = (), *options: str) -> Server:
        """A server for these blocks that is up."""
        number = len(self._servers)
        argv = [str(model), "--dht_prefix", prefix, "--block_indices", blocks, "--torch_dtype", "float32"]
        argv += ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", "10", "--num_handlers", "2"]
        argv += ["--identity_path", str(self._workdir / f"{number}.id"), "--no_auto_relay", "--skip_reachability_check"]
        argv += ["--initial_peers", *initial_peers] if initial_peers else ["--new_swarm"]
        log = self._workdir / f"petals-{number}.log"
        self._zygote.send({"argv": [*argv, *options], "log": str(log)})
        server = Server(int(self._zygote.receive()), log)
        self._servers.append(server)
        server.wait_ready()
        return server

    def close(self) -> None:
        """Ends all of them."""
        for server in self._servers:
            server.kill()
        self._zygote.close()


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """``thing``, closed at the end."""
    try:
        yield thing
    finally:
        thing.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
