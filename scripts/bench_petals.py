#!/usr/bin/env python3
"""Measure this project beside Petals 2.2: the same model, spans and threads, in one run, turn by turn.

    python scripts/bench_petals.py --quick
    python scripts/bench_petals.py --model small
    python scripts/bench_petals.py --model large
    python scripts/bench_petals.py --model large --only stream,sessions

Needs the environment of scripts/petals/setup.sh, which it makes if it is missing. Every client is a process of its own.
Ratios are ours to Petals'; above 1 is better for us. Lines come as they are
measured, and a table in Markdown at the end.
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

from swarm.compute.openmp import set_waiting

ROOT = Path(__file__).parents[1]
PREFIX = "bench-hf"
CLIENT_BYTES = {"ours": 200 << 20, "petals": 320 << 20}
"""What a client may hold of its own, with the daemon that connects it: Petals' as seen, ours a guess."""
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 1408, "vocab": 8192},
    # few words: 64 Petals clients hold 64 copies of embeddings and head
    "large": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate": 5632, "vocab": 8192},
}
DTYPES = {"small": "float32", "large": "bfloat16"}
CACHE_TOKENS = 40960  # of both sides; the largest need is 64 sessions of 48 tokens, or one of 4,098
HELD_TOKENS = 2048
KINDS = ("startup", "idle", "stream", "first", "forward", "sessions", "held", "stall")
START_TIMEOUT = 300.0
Figure = tuple[float | None, str]  # what was measured, and what is to be said about it


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
    cache_tokens: int = CACHE_TOKENS
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
        waiting: dict[str, str] = {}
        set_waiting(waiting)  # as our commands do; it does Petals good, too
        petals = {"PETALS_IGNORE_DEPENDENCY_VERSION": "1", "PYTHONWARNINGS": "ignore"}
        return {**waiting, **os.environ, **offline, **threads, **petals}

    def start(self, blocks: str) -> Server:
        """A server for these blocks that is up."""
        number = len(self.servers)
        peers = [server.address for server in self.servers[:1]]
        if self.name == "ours":
            argv = [ROOT / ".venv" / "bin" / "swarm-node", "serve", self.model, "--blocks", blocks]
            argv += ["--host", "127.0.0.1", "--log-format", "json", "--dtype", self.dtype, "--dht-prefix", PREFIX]
            argv += ["--cache-tokens", str(self.cache_tokens)]
            argv += ["--initial-peers", *peers] if peers else []
        else:
            argv = [self.python, "-m", "petals.cli.run_server", self.model, "--block_indices", blocks]
            argv += ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", "10", "--torch_dtype", self.dtype]
            argv += ["--dht_prefix", PREFIX, "--attn_cache_tokens", str(self.cache_tokens), "--skip_reachability_check"]
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
        return self.answer(timeout + 60 * (count + 4) / 4 + 60)  # they connect four at a time

    def send(self, do: str, *, count: int = 1, **options: Any) -> None:
        """Gives an order."""
        pipe = self._client().stdin
        assert pipe is not None
        common = {"model": str(self.model), "peers": [self.servers[0].address], "prefix": PREFIX, "dtype": self.dtype}
        pipe.write(
            json.dumps({"do": do, "count": count, "threads": self.threads, **common, **options}).encode() + b"\n"
        )
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
            for pipe in (self.client.stdin, self.client.stdout):
                if pipe is not None:
                    pipe.close()
        for server in self.servers:
            server.kill()


class Table:
    """What was measured, a line each, printed as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._begin = time.monotonic()
        print(f"{'':44} {'ours':>10} {'Petals':>10} {'ratio':>7}   load  after", flush=True)

    def add(self, name: str, ours: float | None, petals: float | None, *, more_is_better: bool, note: str = "") -> None:
        """A line; ``None`` where there is no figure."""
        ratio = (ours / petals if more_is_better else petals / ours) if ours and petals else None
        load, seconds = os.getloadavg()[0], time.monotonic() - self._begin
        row = {"name": name, "ours": ours, "petals": petals, "ratio": ratio, "load": load, "note": note}
        cells = self._cells(row)
        shown = f"{cells[0]:44} {cells[1]:>10} {cells[2]:>10} {cells[3]:>7}"
        print(f"{shown}   {cells[4]:>4} {seconds:4.0f} s  {note}", flush=True)
        self.rows.append(row)

    def markdown(self) -> str:
        """All lines as a table."""
        lines = ["| measured | ours | Petals | ratio | load | |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(self._cells(row))} | {row['note']} |" for row in self.rows]
        return "\n".join(lines)

    @staticmethod
    def _cells(row: dict[str, Any]) -> list[str]:
        figures = [f"{row[side]:.2f}" if row[side] is not None else "—" for side in ("ours", "petals")]
        return [row["name"], *figures, f"{row['ratio']:.2f}×" if row["ratio"] else "—", f"{row['load']:.1f}"]


class Bench:
    """The measurements, for one model."""

    def __init__(self, label: str, sides: list[Side], layers: int, table: Table, arguments: argparse.Namespace) -> None:
        self.label, self.sides, self.layers, self.table, self.arguments = label, sides, layers, table, arguments
        self._deadline = time.monotonic() + 60 * arguments.minutes

    def run(self, kind: str) -> None:
        """One kind of measurement, unless time is up."""
        if time.monotonic() > self._deadline:
            note = f"not run: {self.arguments.minutes:.0f} minutes are over"
            self.table.add(f"{self.label}: {kind}", None, None, more_is_better=True, note=note)
            return
        print(f"… {self.label}: {kind}", file=sys.stderr, flush=True)
        getattr(self, kind)()

    def compare(self, name: str, measure: Callable[[Side], Figure], *, more_is_better: bool, rounds: int = 0) -> None:
        """Measures both sides by turns; the medians."""
        values: dict[str, list[float]] = {side.name: [] for side in self.sides}
        notes: list[str] = []
        rounds = rounds or self.arguments.rounds
        for _ in range(rounds):
            for side in self.sides:
                value, note = measure(side)
                if value is not None:
                    values[side.name].append(value)
                if note:
                    notes.append(f"{side.name}: {note}")
        ours, petals = (statistics.median(found) if found else None for found in values.values())
        self.table.add(f"{self.label}: {name}", ours, petals, more_is_better=more_is_better, note="; ".join(notes))

    def startup(self) -> None:
        """Starts the servers: each side's first span, then its second."""
        for blocks in (f"0:{self.layers // 2}", f"{self.layers // 2}:{self.layers}"):
            ours, petals = (side.start(blocks).seconds for side in self.sides)
            self.table.add(f"{self.label}: start-up of {blocks}, s", ours, petals, more_is_better=False)

    def idle(self) -> None:
        """MiB of the first node, which serves half of the blocks, when nobody uses it."""
        ours, petals = (side.servers[0].memory() for side in self.sides)
        self.table.add(f"{self.label}: MiB of an idle node", ours, petals, more_is_better=False)

    def held(self) -> None:
        """MiB of a node with full sessions. It has just one block of the model's size: filling takes long enough."""
        counts = self.arguments.held
        values: dict[int, dict[str, float]] = {count: {} for count in (0, *counts)}
        notes = []
        for side in self.sides:
            folder = side.workdir / f"held-{side.name}"
            folder.mkdir()
            cache_tokens = max(counts) * HELD_TOKENS + 4096
            model = make_model(folder, self.label, layers=1)
            thin = Side(side.name, model, side.dtype, side.threads, folder, cache_tokens)
            with contextlib.closing(thin):
                node = thin.start("0:1")
                values[0][side.name] = node.memory()
                timeout = self.arguments.held_timeout
                thin.send("hold", timeout=timeout, sessions=counts, tokens=HELD_TOKENS)
                while "held" in (answer := thin.answer(timeout + 180)):
                    values[answer["held"]][side.name] = node.memory()
                    thin.go_on()
                if not answer["results"]:
                    notes.append(f"{side.name}: {_what(answer)}")
        for count, found in values.items():
            name = f"{self.label}: MiB of a block, {count} × {HELD_TOKENS}"
            figures = (found.get(side.name) for side in self.sides)
            self.table.add(name, *figures, more_is_better=False, note="; ".join(notes))

    def stream(self) -> None:
        """Tokens a second of one text."""
        tokens = 32 if self.arguments.quick else 64

        def rate(side: Side) -> Figure:
            answer = side.order("generate", prompt=16, tokens=tokens, timeout=self.arguments.timeout)
            return _figure(
                answer, lambda result: (len(result["times"]) - 1) / (result["times"][-1] - result["times"][0])
            )

        self.compare("one stream, tokens/s", rate, more_is_better=True)

    def first(self) -> None:
        """Seconds to the first token."""
        for prompt, rounds in ((1024, 0), (4096, 1)):
            if self.arguments.quick and prompt > 1024:
                continue

            def first(side: Side, prompt: int = prompt) -> Figure:
                answer = side.order("generate", prompt=prompt, tokens=2, timeout=self.arguments.timeout)
                return _figure(answer, lambda result: result["times"][0])

            self.compare(f"first token after {prompt}, s", first, more_is_better=False, rounds=rounds)

    def forward(self) -> None:
        """Tokens a second through all blocks, without a cache."""

        def rate(side: Side) -> Figure:
            answer = side.order("forward", rows=4, tokens=256, timeout=self.arguments.timeout)
            return _figure(answer, lambda result: 1024 / result["seconds"])

        self.compare("forward of 4 × 256, tokens/s", rate, more_is_better=True)

    def sessions(self) -> None:
        """Tokens a second of many texts together, each of a process of its own, until the last has finished."""
        for count in self.arguments.sessions:
            tokens = 16 if self.arguments.quick else 64 if count <= 16 else 32

            def rate(side: Side, count: int = count, tokens: int = tokens) -> Figure:
                if (needed := count * CLIENT_BYTES[side.name]) > (free := _available_bytes()):
                    return None, f"not run: the clients need some {needed >> 30} GiB of memory, {free >> 30} are free"
                answer = side.order("generate", count=count, prompt=16, tokens=tokens, timeout=self.arguments.timeout)
                times = [result["times"] for result in answer["results"]]
                took = max((end[-1] for end in times), default=None)
                note = f"{len(times)} of {count} finished ({_what(answer)})" if len(times) < count else ""
                return (sum(map(len, times)) / took if took else None), note

            rounds = 1 if count > 4 else 0
            self.compare(f"{count} sessions together, tokens/s", rate, more_is_better=True, rounds=rounds)

    def stall(self) -> None:
        """Seconds that a session of 1,000 tokens stands still when its last hop is killed. The last measurement."""
        values, notes = [], []
        for side in self.sides:
            side.start(f"{self.layers // 2}:{self.layers}")
            pids = {server.peer_id: server.process.pid for server in side.servers}
            timeout = self.arguments.stall_timeout
            answer = side.order("stall", prompt=1000, tokens=16, kill_at=8, pids=pids, timeout=timeout)
            value, note = _figure(answer, lambda result: max(result["times"]))
            values.append(value)
            if note:
                notes.append(f"{side.name}: {note} after {timeout:.0f} s")
        name = f"{self.label}: stall when a hop is killed, s"
        self.table.add(name, *values, more_is_better=False, note="; ".join(notes))


def _available_bytes() -> int:
    return int(re.findall(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[0]) * 1024


def make_model(out: Path, label: str, **options: Any) -> Path:
    """A Llama checkpoint that both sides read; ``options`` are sizes that differ from the model's."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_checkpoint import make_checkpoint, make_config

    sizes = {**MODELS[label], **options}
    config = make_config("llama-gqa", positions=8192, dtype=DTYPES[label], std=0.02, eos_token_id=None, **sizes)
    path: Path = make_checkpoint(out / label, config)
    written = json.loads((path / "config.json").read_text())
    written |= {"torch_dtype": written["dtype"], "rope_theta": written["rope_parameters"]["rope_theta"]}
    (path / "config.json").write_text(json.dumps(written, indent=1))
    return path


def _figure(answer: dict[str, Any], of: Callable[[dict[str, Any]], float]) -> Figure:
    """Of the only client's result; what happened to it if it has none."""
    return (float(of(answer["results"][0])), "") if answer["results"] else (None, _what(answer))


def _what(answer: dict[str, Any]) -> str:
    """What became of clients that did not finish."""
    errors = sorted({str(error).strip().splitlines()[-1][:80] for error in answer["failed"]})
    return "; ".join([*([f"{answer['hung']} hung"] if answer["hung"] else []), *errors])


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
    parser.add_argument("--sessions", help="how many at once; default 1,4,16,64; 1,4 with --quick")
    parser.add_argument("--held", help="full sessions of which the memory is measured; default 16,64; 2,4 with --quick")
    parser.add_argument("--rounds", type=int, help="turns of each side; the median counts; default 3; 2 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in each server and client")
    parser.add_argument("--minutes", type=float, default=18.0, help="for each model: no measurement begins later")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds after which a client counts as hung")
    parser.add_argument("--held-timeout", type=float, default=240.0, help="the same, while sessions are filled")
    parser.add_argument("--stall-timeout", type=float, default=60.0, help="the same, for the killed hop")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    sessions = arguments.sessions or ("1,4" if arguments.quick else "1,4,16,64")
    held = arguments.held or ("2,4" if arguments.quick else "16,64")
    arguments.sessions, arguments.held = ([int(count) for count in text.split(",")] for text in (sessions, held))
    kinds = arguments.only.split(",") if arguments.only else KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only takes {','.join(KINDS)}, not {','.join(sorted(unknown))}")
    chosen = arguments.model or ("small" if arguments.quick else "both")
    subprocess.run([ROOT / "scripts" / "petals" / "setup.sh"], check=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    table = Table()
    for label in ("small", "large") if chosen == "both" else (chosen,):
        with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder, contextlib.ExitStack() as stack:
            workdir = Path(folder)
            model = make_model(workdir, label)
            sides = [Side(name, model, DTYPES[label], arguments.threads, workdir) for name in ("ours", "petals")]
            for side in sides:
                stack.callback(side.close)
            bench = Bench(label, sides, MODELS[label]["layers"], table, arguments)
            for kind in KINDS:
                if kind in kinds or kind == "startup":
                    bench.run(kind)
    print(f"\n{table.markdown()}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table.rows, indent=1))


if __name__ == "__main__":
    main()
