"""What a new user does first, with the commands of an installed package: serve the built-in model, generate through it,
and ask a gateway with a swarm of its own.

``try_install.py BIN``: the folder that has the ``swarm`` and ``swarm-node`` of an environment. Needs only Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROMPT, TOKENS = "This method returns", 12
START_SECONDS = 180.0
PAGES = ("", "swarm.html")


def main(commands: Path) -> str:
    """Goes the whole way, at some place without a checkout; the text that was made.

    Raises:
        SystemExit: something didn't work, and this is what.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-try-") as name:
        folder = Path(name)
        node = [str(commands / "swarm-node"), "serve", "demo", "--host", "127.0.0.1", "--log-format", "json"]
        gateway = [str(commands / "swarm"), "gateway", "demo", "--local", "--port", "0"]
        with running(node, folder / "node") as serving, running(gateway, folder / "gateway") as asked:
            peer = wait_ready(serving, folder / "node")["maddrs"][0]
            generate = ["generate", "demo", "--initial-peers", peer, "--max-new-tokens", str(TOKENS), "--json"]
            done = subprocess.run(
                [str(commands / "swarm"), *generate, "--prompt", PROMPT],
                env=environment(folder),
                cwd=folder,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"swarm generate failed:\n{done.stderr[-3000:]}")
            text: str = json.loads(done.stdout)["text"]
            api = wait_ready(asked, folder / "gateway")["url"]
            if not text or complete(api) != text:
                raise SystemExit(f"swarm generate made {text!r}, the gateway {complete(api)!r}")
            look_at_pages(api.removesuffix("/v1"))
    return text


def environment(home: Path) -> dict[str, str]:
    """Without what this process was told about its Python and its swarm. The built-in model needs no Hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SWARM_"))}
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def running(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that ends with the ``with``; what it says is in ``log.out`` and ``log.err``."""
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=environment(log.parent), cwd=log.parent, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The event with which a command says that it serves.

    Raises:
        SystemExit: it has ended, or doesn't say so in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        for line in log.with_suffix(".out").read_text().splitlines(keepends=True):
            if line.endswith("\n") and (event := json.loads(line)).get("event") == "ready":
                return dict(event)
        if ended:
            said = "".join(log.with_suffix(kind).read_text()[-3000:] for kind in (".out", ".err"))
            raise SystemExit(f"{' '.join(map(str, process.args))} did not start:\n{said}")  # type: ignore[arg-type]
        time.sleep(0.1)


def complete(api: str) -> str:
    """What the gateway makes of the prompt."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{api}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def look_at_pages(site: str) -> None:
    """Gets the pages, and the files that they name.

    Raises:
        urllib.error.HTTPError: one of them isn't there.
    """
    for page in PAGES:
        with urllib.request.urlopen(f"{site}/{page}", timeout=30) as answer:
            html = answer.read().decode()
        for name in set(re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]+)"', html)):
            urllib.request.urlopen(f"{site}/{name}", timeout=30).close()


if __name__ == "__main__":
    print(f"It works: {main(Path(sys.argv[1]).absolute())!r}")
