"""What the gateway tells of its swarm, and the commands that ask it with ``--api``."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarm.client.gateway.access.keys import KeyStore
from swarm.client.gateway.node_history import COLUMNS, NodeHistory
from swarm.client.gateway.server import GatewaySettings, running
from swarm.client.session.trace import Answered, HopName, split_time
from swarm.network.lock.invitation import Invitation
from swarm.network.lock.key import SwarmKey
from swarm.network.options import KeyOptions
from swarm.network.overview import Meter, NodeView, Overview
from tests.gateway.conftest import Api, Whole
from tests.swarm_e2e.nodes import Swarm, run_command, run_swarm


def ask(api: Api, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "demo", "stream": True, "temperature": 0, "max_tokens": 12, **fields}
    lines = api.post("/chat/completions", body).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_the_swarm_as_json_and_as_events(api: Api, swarm: Swarm) -> None:
    seen = api.get("/api/swarm").json()
    (fields,) = seen["models"]
    overview = Overview.from_dict(fields)
    assert (overview.model, overview.num_blocks, overview.holes) == ("demo", 8, ())
    assert [(node.start, node.end) for node in overview.nodes] == [(0, 4), (4, 8)]
    assert all(node.meter is not None and node.meter.rtt > 0 for node in overview.nodes)
    assert seen["join"] == {"demo": ["demo", *swarm.initial_peers]}
    assert "invitation" not in seen
    with httpx.stream("GET", api.url.removesuffix("/v1") + "/api/swarm/events", timeout=30) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in events.iter_lines() if line)
        looks = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
    measured = [look["models"][0]["nodes"][0]["meter"]["at"] for look in looks]
    assert measured == sorted(set(measured)), "each event is a new look"
    assert looks[-1]["models"][0]["nodes"][0]["rates"] is not None


def test_a_nodes_history_is_for_nodes_that_were_seen(api: Api, swarm: Swarm) -> None:
    api.get("/api/swarm")
    known = api.get(f"/api/swarm/nodes/{swarm.nodes[0].peer_id}").json()
    assert tuple(known["columns"]) == COLUMNS
    assert api.get("/api/swarm/nodes/Qm").status_code == 404


def test_who_holds_a_key_of_the_gateway_is_invited_to_its_locked_swarm(tmp_path: Path) -> None:
    keys, key, file = KeyStore(tmp_path / "keys.sqlite"), SwarmKey.new(), tmp_path / "swarm.key"
    alice = {"Authorization": f"Bearer {keys.add('alice')}"}
    keys.close()
    file.write_text(key.text())
    with run_swarm("demo", ("0:8",), "--swarm-key", str(file)) as locked:
        peers = tuple(locked.initial_peers)
        settings = GatewaySettings(("demo",), initial_peers=peers, key=KeyOptions(swarm_key=(file,)), port=0)
        for host, headers, told in (
            ("0.0.0.0", alice, Invitation(peers, key).line()),
            ("127.0.0.1", {}, None),  # asks for no key, so whoever is on this machine could look
        ):
            with running(replace(settings, host=host, keys_file=tmp_path / "keys.sqlite"), lambda _: None) as gateway:
                url = gateway.url.removesuffix("/v1").replace("0.0.0.0", "127.0.0.1")
                seen = httpx.get(f"{url}/api/swarm", headers=headers, timeout=30).json()
                assert seen["invitation"] == told
                assert seen["join"] == {"demo": ["demo", *peers]}


def test_with_keys_the_swarm_is_for_those_who_have_one(settings: GatewaySettings, tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite")
    secret = keys.add("alice")
    keys.close()
    # keys are asked for by the address, which isn't loopback's here
    with running(replace(settings, host="0.0.0.0", keys_file=tmp_path / "keys.sqlite"), lambda _: None) as gateway:
        base = gateway.url.removesuffix("/v1").replace("0.0.0.0", "127.0.0.1")
        for path in ("/api/swarm", "/api/swarm/events", "/api/swarm/nodes/Qm"):
            assert httpx.get(base + path).status_code == 401
        mine = {"Authorization": f"Bearer {secret}"}
        assert httpx.get(base + "/api/swarm", headers=mine, timeout=30).status_code == 200
        assert httpx.get(base + "/").status_code == 200, "the page asks for the key"


def test_other_hosts_may_not_look(api: Api) -> None:
    assert api.get("/api/swarm", Host="evil.example").status_code == 403
    assert api.get("/api/swarm/events", Origin="https://evil.example").status_code == 403


def test_commands_ask_a_gateway(api: Api, whole: Whole) -> None:
    def run(*argv: str, said: str = "") -> subprocess.CompletedProcess[str]:
        done = run_command(["swarm", *argv, "--api", api.url], said=said)
        assert done.returncode == 0, done.stderr
        return done

    status = json.loads(run("status", "demo", "--json").stdout)
    assert [node["blocks"] for node in status["nodes"]] == [[0, 4], [4, 8]]
    made = json.loads(run("generate", "--prompt", "Return the", "--max-new-tokens", "12", "--json").stdout)
    assert made["text"] == whole.greedy("Return the", 12)
    chat = run("chat", "--max-new-tokens", "8", "--temperature", "0", said="Hello\n/exit\n")
    assert whole.greedy(whole.chat_prompt("Hello"), 8).strip() in chat.stdout


def test_a_trace_has_every_tokens_time_in_each_hop(api: Api) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    plain, traced = ask(api, messages=messages), ask(api, messages=messages, swarm_trace=True)
    assert not any("swarm" in chunk for chunk in plain)

    def text(chunks: list[dict[str, Any]]) -> str:
        return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])

    assert text(traced) == text(plain)
    parts = [chunk["swarm"] for chunk in traced if "swarm" in chunk]
    events = [event for part in parts for event in part["events"]]
    assert [event["kind"] for event in events] == ["route"]
    assert [(hop["start"], hop["end"]) for hop in events[0]["hops"]] == [(0, 4), (4, 8)]
    tokens = [token for part in parts for token in part["tokens"]]
    assert len(tokens) == 12
    for token in tokens:
        assert [(hop["start"], hop["end"]) for hop in token["hops"]] == [(0, 4), (4, 8)]
        for hop in token["hops"]:
            assert hop["compute_ms"] > 0
            assert hop["queue_ms"] >= 0
            assert hop["network_ms"] >= 0


def test_a_steps_time_is_divided_among_its_hops() -> None:
    first, second = HopName("a", None, 0, 4), HopName("b", "bee", 4, 8)
    times = split_time(10.0, [(first, [Answered(10.5, 0.1, 0.25)]), (second, [Answered(11.5, 0.0, 0.5)])])
    assert [time.hop for time in times] == [first, second]
    assert [round(time.network_s, 6) for time in times] == [0.15, 0.5]
    # the first answer was late, or even overtaken: the sum is still the time that passed
    for at in (11.2, 11.6):
        late = split_time(10.0, [(first, [Answered(at, 0.1, 0.25)]), (second, [Answered(11.5, 0.25, 0.5)])])
        assert sum(time.queue_s + time.compute_s + time.network_s for time in late) == pytest.approx(1.5)
        assert late[1].network_s == 0
    # and hops that tell more than there was
    assert [time.network_s for time in split_time(0.0, [(first, [Answered(1.0, 9.0, 9.0)])])] == [0.0]
    assert split_time(0.0, [(first, [])]) == ()


def test_history_has_a_point_every_five_seconds_for_ten_minutes() -> None:
    def overview(at: float, tokens: int, busy: float) -> Overview:
        meter = Meter(at, 0.002, 1, 0, 0, tokens, busy, 100, 25)
        node = NodeView("Qm", None, "online", 0, 8, 1.0, None, None, None, None, None, None, False, None, meter=meter)
        return Overview("demo", "demo", 8, (node,), ())

    history = NodeHistory()
    for second in range(1000):
        history.add(1e9 + second, overview(float(second), 7 * second, 0.5 * second))
    points = history.points("Qm")
    assert points is not None
    assert len(points) == 120
    assert dict(zip(COLUMNS, points[-1], strict=True)) == {
        "time": 1e9 + 995,
        "decode": 7.0,
        "prefill": 0.0,
        "busy": 0.5,
        "sessions": 1,
        "waiting": 0,
        "cache_used": 0.75,
        "rtt_ms": 2.0,
    }
    history.add(1e9 + 1001, overview(1001.0, 0, 0.0))  # started anew: no rates below zero
    history.add(1e9 + 1006, overview(1006.0, 5, 0.1))
    points = history.points("Qm")
    assert points is not None
    assert points[-1][1] == 1.0
    assert history.points("other") is None
    history.add(1e9 + 2000, Overview("demo", "demo", 8, (), ((0, 8),)))
    assert history.points("Qm") is None, "forgotten, or strangers could fill the memory"
