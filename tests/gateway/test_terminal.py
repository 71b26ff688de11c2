"""Commands in terminals that are not as one would wish: bytes that are no text, readers that leave, proxies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.gateway.conftest import Api
from tests.models import tiny_model
from tests.swarm_e2e.nodes import START_TIMEOUT, Node, Swarm, Zygote, run_command

DEAD_PROXY = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
SOCKS = {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}
NOT_TEXT = b"caf\xe9"


def peers(swarm: Swarm) -> list[str]:
    return ["--initial-peers", *swarm.initial_peers]


def is_one_line(done: subprocess.CompletedProcess[str], says: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


# text


def test_text_from_stdin_that_is_not_utf8(swarm: Swarm, api: Api) -> None:
    for where in (peers(swarm), ["--api", api.url]):
        done = run_command(["swarm", "generate", "demo", *where], said=NOT_TEXT)
        is_one_line(done, "the text from stdin is not text in UTF-8")


def test_arguments_that_are_not_utf8() -> None:
    broken = os.fsdecode(NOT_TEXT)
    for argv in (
        ["swarm", "generate", "demo", "-p", broken, "--api", "http://127.0.0.1:9"],
        ["swarm", "gateway", "keys", "add", broken],
        ["swarm-node", "serve", "demo", "--name", broken],
        ["swarm-node", "status", broken],
    ):
        is_one_line(run_command(argv), "is not text in UTF-8")


def test_a_line_of_a_conversation_that_is_not_utf8_is_refused_alone(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = [b"Hi", NOT_TEXT, b"/save ~nobody-of-this-name/x", b"/save " + os.fsencode(file), b"/exit"]
    argv = ["swarm", "chat", "demo", "--api", api.url, "--max-new-tokens", "4"]
    done = run_command(argv, said=b"\n".join(said))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error: what you said is not text in UTF-8" in done.stderr
    assert "Error: can't write ~nobody-of-this-name/x" in done.stderr
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]


def test_tokens_that_the_model_has_not_learned(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model has embeddings for."""
    from transformers import AutoTokenizer

    from swarm.model.source import resolve

    path = tiny_model("llama-gqa")
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    AutoTokenizer.from_pretrained(resolve("demo").path).save_pretrained(tmp_path)
    node = Node(["serve", str(tmp_path), "--host", "127.0.0.1", "--log-format", "json"], tmp_path)
    try:
        where = ["--initial-peers", *node.wait_ready()["maddrs"]]
        done = run_command(["swarm", "generate", str(tmp_path), *where, "-p", "This method returns"])
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "token ids of this model are below" in done.stderr
    finally:
        node.kill()


# readers


@pytest.mark.parametrize(
    "argv",
    [
        ["swarm", "--help"],
        ["swarm-node", "serve", "--help"],
        ["swarm", "generate", "demo", "{peers}", "-p", "Hi", "--max-new-tokens", "400"],
        ["swarm", "generate", "demo", "{peers}", "-p", "Hi", "--max-new-tokens", "4", "--json"],
        ["swarm", "generate", "demo", "{api}", "-p", "Hi", "--max-new-tokens", "4"],
        ["swarm", "chat", "demo", "{api}", "--max-new-tokens", "4"],
        ["swarm", "status", "demo", "{peers}", "--once"],
        ["swarm", "status", "demo", "{peers}", "--json"],
        ["swarm", "top", "demo", "{peers}"],
        ["swarm", "top", "demo", "{api}"],
        ["swarm-node", "status", "demo", "{peers}"],
        ["swarm-node", "status", "demo", "{peers}", "--json"],
        ["swarm", "gateway", "keys", "list"],
    ],
)
def test_commands_end_without_a_word_when_nobody_reads(swarm: Swarm, api: Api, tmp_path: Path, argv: list[str]) -> None:
    given = {"{peers}": peers(swarm), "{api}": ["--api", api.url]}
    argv = [part for argument in argv for part in given.get(argument, [argument])]
    done = run_command(argv, said="Hi\n", read=False, env={"SWARM_KEYS_FILE": str(tmp_path / "keys")})
    assert done.returncode == 1, done.stderr
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_node_goes_on_when_nobody_reads(log_format: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["swarm-node", "serve", str(tiny_model("llama-gqa")), "--host", "127.0.0.1", "--port", str(port)]
    errors = tmp_path / "stderr"
    node = Zygote.start([*argv, "--log-format", log_format], None, errors)
    deadline = time.monotonic() + START_TIMEOUT
    while not served(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(node, signal.SIGTERM)
    assert Zygote.wait(node) == 0, errors.read_text()
    assert "Traceback" not in errors.read_text()


def served(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


# proxies


@pytest.mark.parametrize("proxy", [DEAD_PROXY, SOCKS])
def test_proxies_are_not_for_this_machine(api: Api, proxy: dict[str, str]) -> None:
    where = ["--api", api.url]
    for argv in (["generate", "-p", "Hi", "--max-new-tokens", "2", "--json"], ["status", "--json"]):
        done = run_command(["swarm", argv[0], "demo", *where, *argv[1:]], env=proxy)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def test_a_proxy_that_cannot_be_used(swarm: Swarm) -> None:
    for argv in (["generate", "-p", "Hi"], ["status", "--json"]):
        done = run_command(["swarm", argv[0], "demo", "--api", "http://198.51.100.1", *argv[1:]], env=SOCKS)
        is_one_line(done, "proxy that the environment names")
    done = run_command(["swarm-node", "serve", "no/such-model"], env={**SOCKS, "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999", "localhost", "http://127.0.0.1:9"])
def test_addresses_that_are_none(url: str) -> None:
    for argv in (["generate", "-p", "Hi"], ["status", "--json"]):
        done = run_command(["swarm", argv[0], "demo", "--api", url, *argv[1:]])
        is_one_line(done, "Error: ")
