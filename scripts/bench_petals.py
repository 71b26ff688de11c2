#!/usr/bin/env python3
"""Measure this project beside Petals 2.2: the same model, spans and threads, in one run, turn by turn.

    python scripts/bench_petals.py --quick
    python scripts/bench_petals.py --only stream,sessions --model large --sessions 1,4,16,64

Needs the environment of scripts/petals/setup.sh, which it makes if it is missing. Every client is a process of its own.
Ratios are ours to Petals'; above 1 is better for us.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PREFIX = "bench-hf"
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 1408, "vocab": 8192},
    "large": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate": 5632, "vocab": 32000},
}
DTYPES = {"small": "float32", "large": "bfloat16"}
CACHE_TOKENS = 40960
KINDS = ("startup", "memory", "stream", "first", "forward", "sessions", "stall")
START_TIMEOUT = 300.0


@dataclass
class Server:
    """One server of either side; a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    seconds: float = 0.0
    address: str = ""

    @property
    def peer_id(self) -> str:
        """Its name in the swarm."""
        return self.address.rpartition("/")[2]

    def memory(self) -> float:
        """MiB that it and its children hold, shared pages counted by share."""
        total = 0
        for pid in _tree(self.process.pid):
            with contextlib.suppress(OSError):
                found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
        return total / 1024

    def kill(self) -> None:
        """Ends it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Side:
    """One of the two that are compared: its servers, and the process that forks its clients."""

    name: str
    model: Path
    dtype: str
    threads: int
    workdir: Path
    servers: list[Server] = field(default_factory=list)
    client: subprocess.Popen[bytes] | None = None

    @property
    def python(self) -> Path:
        """The side's Python."""
        return ROOT / (".venv" if self.name == "ours" else ".venv-petals") / "bin" / "python"

    @property
    def environment(self) -> dict[str, str]:
        """The same threads for both; nobody looks at the internet."""
        offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        return {**os.environ, **offline, **threads, "PETALS_IGNORE_DEPENDENCY_VERSION": "1", "PYTHONWARNINGS": "ignore"}

    def start(self, blocks: str) -> Server:
        """A server for these blocks that is up."""
        number = len(self.servers)
        peers = [server.address for server in self.servers[:1]]
        if self.name == "ours":
            argv = [ROOT / ".venv" / "bin" / "swarm-node", "serve", self.model, "--blocks", blocks]
            argv += ["--host", "127.0.0.1", "--log-format", "json", "--dtype", self.dtype, "--dht-prefix", PREFIX]
            argv += ["--cache-tokens", str(CACHE_TOKENS)]
            argv += ["--initial-peers", *peers] if peers else []
        else:
            argv = [self.python, "-m", "petals.cli.run_server", self.model, "--block_indices", blocks]
            argv += ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", "10", "--torch_dtype", self.dtype]
            argv += ["--dht_prefix", PREFIX, "--attn_cache_tokens", str(CACHE_TOKENS), "--skip_reachability_check"]
            argv += ["--no_auto_relay", "--identity_path", self.workdir / f"{number}.id"]
            argv += ["--initial_peers", *peers] if peers else ["--new_swarm"]
        log = self.workdir / f"{self.name}-{number}.log"
        start = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(part) for part in argv],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        server = Server(process, log)
        self.servers.append(server)
        while not (address := self._address(log.read_text())):
            if process.poll() is not None or time.monotonic() - start > START_TIMEOUT:
                raise SystemExit(f"{self.name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        server.seconds, server.address = time.monotonic() - start, address
        return server

    def _address(self, text: str) -> str:
        """Where a server that says this is reached, once it serves."""
        if self.name == "petals":
            found = re.search(r"Running a server on (\[.*\])", text)
            return str(ast.literal_eval(found[1])[0]) if found and "Started" in text else ""
        for line in text.splitlines(keepends=True):
            if '"ready"' in line and line.endswith("\n"):
                return str(json.loads(line)["maddrs"][0])
        return ""

    def order(self, do: str, *, count: int = 1, timeout: float = 120.0, **options: Any) -> dict[str, Any]:
        """Has ``count`` clients do something."""
        self.send(do, count=count, timeout=timeout, **options)
        return self.answer(2 * timeout + 60)

    def send(self, do: str, **options: Any) -> None:
        """Gives an order."""
        pipe = self._client().stdin
        assert pipe is not None
        common = {"model": str(self.model), "peers": [self.servers[0].address], "prefix": PREFIX, "dtype": self.dtype}
        pipe.write(json.dumps({"do": do, "threads": self.threads, **common, **options}).encode() + b"\n")
        pipe.flush()

    def go_on(self) -> None:
        """Ends a wait of the clients'."""
        assert self.client is not None
        assert self.client.stdin is not None
        self.client.stdin.write(b"\n")
        self.client.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next answer of the clients'."""
        assert self.client is not None
        assert self.client.stdout is not None
        ready, _, _ = select.select([self.client.stdout], [], [], timeout)
        line = self.client.stdout.readline() if ready else b""
        if not line:
            raise SystemExit(f"no answer from the clients of {self.name}: see {self.workdir}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _client(self) -> subprocess.Popen[bytes]:
        if self.client is None:
            script = ROOT / "scripts" / "petals" / "bench_client.py"
            with (self.workdir / f"{self.name}-clients.log").open("w") as log:
                self.client = subprocess.Popen(
                    [self.python, script, self.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self.environment,
                )
            self.answer(120)
        return self.client

    def close(self) -> None:
        """Ends everything."""
        if self.client is not None:
            self.client.kill()
            self.client.wait()
        for server in self.servers:
            server.kill()


class Table:
    """What was measured, a line each, printed as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{'':44} {'ours':>10} {'Petals':>10} {'ratio':>7}   load", flush=True)

    def add(self, name: str, ours: float | None, petals: float | None, *, more_is_better: bool, note: str = "") -> None:
        """A line; ``None`` where there is no figure."""
        ratio = (ours / petals if more_is_better else petals / ours) if ours and petals else None
        cells = [f"{value:10.2f}" if value is not None else f"{'—':>10}" for value in (ours, petals)]
        shown = f"{ratio:6.2f}×" if ratio is not None else f"{'—':>7}"
        print(f"{name:44} {cells[0]} {cells[1]} {shown}   {os.getloadavg()[0]:.1f}  {note}", flush=True)
        self.rows.append({"name": name, "ours": ours, "petals": petals, "ratio": ratio, "note": note})


class Bench:
    """The measurements, for one model."""

    def __init__(self, label: str, sides: list[Side], layers: int, table: Table, arguments: argparse.Namespace) -> None:
        self.label, self.sides, self.layers, self.table, self.arguments = label, sides, layers, table, arguments

    def compare(self, name: str, measure: Callable[[Side], float | None], *, more_is_better: bool) -> None:
        """Measures both sides by turns; the medians."""
        values: dict[str, list[float]] = {side.name: [] for side in self.sides}
        for _ in range(self.arguments.rounds):
            for side in self.sides:
                value = measure(side)
                if value is not None:
                    values[side.name].append(value)
        ours, petals = (statistics.median(found) if found else None for found in values.values())
        self.table.add(f"{self.label}: {name}", ours, petals, more_is_better=more_is_better)

    def startup(self) -> None:
        """Starts the servers: each side's first span, then its second."""
        for blocks in (f"0:{self.layers // 2}", f"{self.layers // 2}:{self.layers}"):
            ours, petals = (side.start(blocks).seconds for side in self.sides)
            self.table.add(f"{self.label}: start-up of {blocks}, s", ours, petals, more_is_better=False)

    def memory(self) -> None:
        """MiB of the first node, idle and with full sessions."""

        def idle(side: Side) -> float:
            return side.servers[0].memory()

        def held(side: Side) -> float | None:
            side.send("hold", count=1, timeout=self.arguments.timeout, sessions=16, tokens=2048)
            if "held" not in side.answer(3 * self.arguments.timeout):
                return None
            result = side.servers[0].memory()
            side.go_on()
            side.answer(60)
            return result

        for name, measure in (("idle", idle), ("16 sessions of 2,048", held)):
            ours, petals = (measure(side) for side in self.sides)
            self.table.add(f"{self.label}: MiB of a node, {name}", ours, petals, more_is_better=False)

    def stream(self) -> None:
        """Tokens a second of one text."""
        tokens = 32 if self.arguments.quick else 64

        def rate(side: Side) -> float | None:
            return _rate(side.order("generate", prompt=16, tokens=tokens, timeout=self.arguments.timeout))

        self.compare("one stream, tokens/s", rate, more_is_better=True)

    def first(self) -> None:
        """Seconds to the first token."""
        for prompt in (1024,) if self.arguments.quick else (1024, 4096):

            def first(side: Side, prompt: int = prompt) -> float | None:
                answer = side.order("generate", prompt=prompt, tokens=2, timeout=self.arguments.timeout)
                return float(answer["results"][0]["times"][0]) if answer["results"] else None

            self.compare(f"first token after {prompt}, s", first, more_is_better=False)

    def forward(self) -> None:
        """Tokens a second through all blocks, without a cache."""

        def rate(side: Side) -> float | None:
            answer = side.order("forward", rows=4, tokens=256, timeout=self.arguments.timeout)
            return 1024 / float(answer["results"][0]["seconds"]) if answer["results"] else None

        self.compare("forward of 4 × 256, tokens/s", rate, more_is_better=True)

    def sessions(self) -> None:
        """Tokens a second of many texts together, each of a process of its own."""
        tokens = 16 if self.arguments.quick else 32
        for count in self.arguments.sessions:
            values, notes = [], []
            for side in self.sides:
                answer = side.order("generate", count=count, prompt=16, tokens=tokens, timeout=self.arguments.timeout)
                times = [result["times"] for result in answer["results"]]
                took = max((end[-1] for end in times), default=None)
                values.append(sum(map(len, times)) / took if took else None)
                if answer["failed"] or answer["hung"]:
                    notes.append(f"{side.name}: {len(answer['failed'])} failed, {answer['hung']} hung")
            name = f"{self.label}: {count} sessions together, tokens/s"
            self.table.add(name, *values, more_is_better=True, note="; ".join(notes))

    def stall(self) -> None:
        """Seconds that a session of 1,000 tokens stands still when its last hop is killed. The last measurement."""
        values, notes = [], []
        for side in self.sides:
            side.start(f"{self.layers // 2}:{self.layers}")
            pids = {server.peer_id: server.process.pid for server in side.servers}
            answer = side.order(
                "stall", prompt=1000, tokens=16, kill_at=8, pids=pids, timeout=self.arguments.stall_timeout
            )
            values.append(max(answer["results"][0]["times"]) if answer["results"] else None)
            if not answer["results"]:
                what = answer["failed"][0].splitlines()[-1] if answer["failed"] else "had not gone on"
                notes.append(f"{side.name} after {self.arguments.stall_timeout:.0f} s: {what[:80]}")
        name = f"{self.label}: stall when a hop is killed, s"
        self.table.add(name, *values, more_is_better=False, note="; ".join(notes))


def make_model(out: Path, label: str) -> Path:
    """A Llama checkpoint that both sides read."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_checkpoint import make_checkpoint, make_config

    config = make_config("llama-gqa", positions=8192, dtype=DTYPES[label], std=0.02, eos_token_id=None, **MODELS[label])
    path: Path = make_checkpoint(out / label, config)
    written = json.loads((path / "config.json").read_text())
    written |= {"torch_dtype": written["dtype"], "rope_theta": written["rope_parameters"]["rope_theta"]}
    (path / "config.json").write_text(json.dumps(written, indent=1))
    return path


def _rate(answer: dict[str, Any]) -> float | None:
    if not answer["results"]:
        return None
    times = answer["results"][0]["times"]
    return (len(times) - 1) / float(times[-1] - times[0])


def _tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, few tokens, at most 4 sessions")
    parser.add_argument("--model", choices=("small", "large", "both"), help="default: both; small with --quick")
    parser.add_argument("--only", help=f"some of {','.join(KINDS)}; servers are started in any case")
    parser.add_argument("--sessions", help="how many at once; default 1,4,16; 1,4 with --quick")
    parser.add_argument("--rounds", type=int, help="turns of each side; the median counts; default 3; 2 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in each server and client")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a client counts as hung")
    parser.add_argument("--stall-timeout", type=float, default=60.0, help="the same, for the killed hop")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    sessions = arguments.sessions or ("1,4" if arguments.quick else "1,4,16")
    arguments.sessions = [int(count) for count in sessions.split(",")]
    kinds = arguments.only.split(",") if arguments.only else KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only takes {','.join(KINDS)}, not {','.join(sorted(unknown))}")
    chosen = arguments.model or ("small" if arguments.quick else "both")
    subprocess.run([ROOT / "scripts" / "petals" / "setup.sh"], check=True)
    table = Table()
    for label in ("small", "large") if chosen == "both" else (chosen,):
        with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder, contextlib.ExitStack() as stack:
            workdir = Path(folder)
            model = make_model(workdir, label)
            sides = [Side(name, model, DTYPES[label], arguments.threads, workdir) for name in ("ours", "petals")]
            for side in sides:
                stack.callback(side.close)
            bench = Bench(label, sides, MODELS[label]["layers"], table, arguments)
            bench.startup()
            for kind in KINDS[1:]:
                if kind in kinds:
                    getattr(bench, kind)()
    if arguments.json:
        arguments.json.write_text(json.dumps(table.rows, indent=1))


if __name__ == "__main__":
    main()
