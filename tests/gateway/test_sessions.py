"""Clients that hang up, a queue that is full, keys, nodes that die; and the command by itself."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from swarm.client.gateway.access.keys import KeyStore
from swarm.client.gateway.server import GatewaySettings, running
from tests.gateway.conftest import Api, Whole
from tests.swarm_e2e.nodes import Swarm, figures, run_command, run_swarm

ENDLESS: Any = {"model": "demo", "prompt": "This returns", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Waits for what has to happen, much longer than it takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def hanging(api: Api, stream: bool) -> Iterator[None]:
    """A request that is broken off when the ``with`` is left."""
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    host, _, port = api.url.removeprefix("http://").removesuffix("/v1").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(1)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_session_at_every_hop(api: Api, swarm: Swarm, stream: bool) -> None:
    def sessions() -> list[float]:
        return [node.figures["swarm_sessions"] for node in swarm.nodes]

    def cache() -> list[float]:
        return [node.figures["swarm_cache_tokens_used"] for node in swarm.nodes]

    before = len(api.log)
    with hanging(api, stream):
        assert until(lambda: sessions() == [1, 1] and min(cache()) > 0)
    begin = time.monotonic()
    assert until(lambda: sessions() == [0, 0] and cache() == [0, 0])
    freed = time.monotonic() - begin
    assert until(lambda: len(api.log) > before)
    assert api.log[-1]["status"] == 499
    assert api.log[-1]["completion_tokens"] < 1500, f"went on to the end, freed after {freed:.1f} s"


def test_a_stop_string_frees_the_session(api: Api, swarm: Swarm) -> None:
    answer = api.post("/completions", {**ENDLESS, "stop": "e"})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert until(lambda: all(node.figures["swarm_sessions"] == 0 for node in swarm.nodes))


def test_a_full_queue_says_when_to_come_back(small: Api) -> None:
    metrics = f"{small.url.removesuffix('/v1')}/metrics"
    with hanging(small, True), hanging(small, True):
        with hanging(small, False):
            assert until(lambda: figures(metrics)["swarm_gateway_queue_depth"] == 1)
            assert figures(metrics)["swarm_gateway_sessions"] == 2
            for extra in ({}, {"stream": True}):
                answer = small.post("/completions", {**ENDLESS, **extra})
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
        # who gave up waiting leaves the queue
        assert until(lambda: figures(metrics)["swarm_gateway_queue_depth"] == 0)
    assert until(lambda: figures(metrics)["swarm_gateway_sessions"] == 0)
    answer = small.post("/completions", {**ENDLESS, "max_tokens": 2})
    assert answer.status_code == 200
    never = small.post("/completions", {**ENDLESS, "max_tokens": 2, "n": 4})
    assert (never.status_code, never.headers.get("retry-after")) == (400, None), "it is not for later"


def test_more_requests_than_sessions_wait_for_their_turn(small: Api, whole: Whole) -> None:
    right = whole.greedy("A list", 10)
    with ThreadPoolExecutor(3) as pool:
        create = small.client.completions.create
        made = list(pool.map(lambda _: create(model="demo", prompt="A list", max_tokens=10, temperature=0), range(3)))
    assert [each.choices[0].text for each in made] == [right] * 3


def test_a_node_dies_and_not_a_token_changes(settings: GatewaySettings, whole: Whole) -> None:
    with run_swarm("demo", ("0:4", "4:8", "4:8")) as swarm:
        peers = tuple(swarm.initial_peers)
        with running(replace(settings, initial_peers=peers, wait_timeout=0), lambda fields: None) as gateway:
            client = openai.OpenAI(base_url=gateway.url, api_key="unused", max_retries=0)
            options: Any = {"model": "demo", "prompt": "A list", "max_tokens": 40, "temperature": 0}
            raw = client.completions.with_raw_response.create(**options, stream=True)
            used = raw.headers["x-swarm-route"].split(" -> ")[1].partition("[")[0]
            texts = []
            for chunk in raw.parse():
                texts.append(chunk.choices[0].text)
                if len(texts) == 10:
                    swarm.node_of(used).kill()
            assert "".join(texts) == whole.greedy("A list", 40)
            for node in swarm.nodes[1:]:
                if node.alive:
                    node.kill()
            # nobody is left for half of the blocks: in the middle of a stream there is no status code any more
            with pytest.raises(openai.InternalServerError) as error:
                client.completions.create(**options)
            assert error.value.status_code == 503
            assert error.value.code == "missing_blocks"
            assert "retry-after" in error.value.response.headers
            with pytest.raises(openai.InternalServerError):
                client.completions.create(**options, stream=True)


def test_keys_limits_and_logs(settings: GatewaySettings) -> None:
    store = KeyStore(settings.keys_file)
    # two minutes can't pass between the calls of this test: it is one that the limit of two ends
    key, few = store.add("alice"), store.add("bob", requests_per_minute=2)
    log: list[dict[str, Any]] = []
    everywhere = replace(settings, host="0.0.0.0", cors_origins=("https://friend.example",))
    with running(everywhere, log.append) as gateway:
        url = gateway.url.replace("0.0.0.0", "127.0.0.1")
        body = {"model": "demo", "prompt": "A list", "max_tokens": 3, "temperature": 0}

        def ask(key: str) -> httpx.Response:
            return httpx.post(f"{url}/completions", json=body, headers={"Authorization": f"Bearer {key}"})

        assert openai.OpenAI(base_url=url, api_key=key).models.list().data[0].id == "demo"
        with pytest.raises(openai.AuthenticationError) as error:
            openai.OpenAI(base_url=url, api_key="sk-wrong").models.list()
        assert error.value.code == "invalid_api_key"
        assert httpx.get(f"{url}/models").headers["www-authenticate"] == "Bearer"
        assert [ask(few).status_code for _ in range(3)] == [200, 200, 429]
        assert 1 <= int(ask(few).headers["retry-after"]) <= 60
        assert ask(key).status_code == 200
        assert until(lambda: sum(each.requests for each in store.list()) == 3)
        used = {each.key.name: each for each in store.list()}
        assert (used["bob"].requests, used["bob"].completion_tokens, used["alice"].requests) == (2, 6, 1)
        assert log[0].keys() >= {"id", "key", "status", "prompt_tokens", "completion_tokens", "route", "queue_seconds"}
        assert [each["key"] for each in log] == ["bob", "bob", "alice"]
        assert "A list" not in json.dumps(log), "no prompts unless asked for"
        store.remove("alice")
        assert ask(key).status_code == 401
        # a browser asks first, without a key
        origin = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(f"{url}/completions", headers=origin)
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"


def test_metrics_health_pages_and_hosts(api: Api) -> None:
    assert api.get("/healthz").json() == {"status": "ok", "models": ["demo"]}
    api.post("/completions", {**ENDLESS, "max_tokens": 2})
    text = api.get("/metrics").text
    assert 'swarm_gateway_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert "swarm_gateway_first_token_seconds_count" in text
    assert "<title>Chat" in api.get("/").text
    assert api.get("/../app.py").status_code == 404
    assert api.get("/nothing").status_code == 404
    assert api.get("/v1/models", Host="evil.example").status_code == 403
    assert api.get("/v1/models", Origin="https://evil.example").status_code == 403
    options = httpx.options(api.url + "/completions", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in options.headers


def test_prompts_in_the_log_when_asked_for(settings: GatewaySettings) -> None:
    log: list[dict[str, Any]] = []
    with running(replace(settings, log_prompts=True), log.append) as gateway:
        httpx.post(gateway.url + "/completions", json={**ENDLESS, "max_tokens": 1})
    assert log[0]["prompt"] == ENDLESS["prompt"]


# the command


def gateway(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_command(["swarm", "gateway", *argv], env=env)


def test_the_command_alone_gives_a_working_endpoint_and_leaves_nothing(whole: Whole) -> None:
    code = "from swarm.client.cli import main; main()"
    argv = [sys.executable, "-c", code, "gateway", "demo", "--local", "--local-nodes", "1", "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        made = openai.OpenAI(base_url=ready["url"], api_key="x").completions.create(
            model="demo", prompt="A list", max_tokens=5, temperature=0
        )
        assert made.choices[0].text == whole.greedy("A list", 5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        nodes = [pid for pid, command in commands.items() if "serve" in command]
        assert len(nodes) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in nodes)
    finally:
        process.kill()
        process.wait()


def test_keys_by_command(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.sqlite")
    refused = gateway("demo", "--initial-peers", "/ip4/127.0.0.1/tcp/1", "--host", "0.0.0.0", SWARM_KEYS_FILE=file)
    assert refused.returncode == 2
    assert "swarm gateway keys add" in refused.stderr
    made = gateway("keys", "add", "alice", "--requests-per-minute", "7", SWARM_KEYS_FILE=file)
    assert KeyStore(Path(file)).find(made.stdout.strip()) is not None
    assert "alice" in gateway("keys", "list", SWARM_KEYS_FILE=file).stdout
    assert gateway("keys", "remove", "alice", SWARM_KEYS_FILE=file).returncode == 0
    assert gateway("keys", "remove", "alice", SWARM_KEYS_FILE=file).returncode == 2


def test_without_the_extra_the_command_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['starlette'] = None; from swarm.client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "gateway", "demo", "--local"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "pip install 'swarm-llm[gateway]'" in done.stderr


def test_usage_errors() -> None:
    for argv, says in (((), "Usage"), (("demo",), "--local"), (("demo", "x", "--local"), "one model")):
        done = gateway(*argv)
        assert done.returncode == 2
        assert says in done.stdout + done.stderr
