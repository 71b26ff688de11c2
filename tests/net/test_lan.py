"""``--lan``: swarms that find themselves, on real (virtual) networks, with nothing copied from machine to machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.model.source import resolve
from tests.net.lan_hosts import DOCKER, LanHost, Lans, make_lans, why_no_lans

pytestmark = pytest.mark.skipif("why_no_lans() is not None", reason=f"{why_no_lans()}")
PROMPT = "import os"


@pytest.fixture(scope="module")
def expected() -> str:
    """What the whole model says."""
    path = resolve("demo").path
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    whole: Any = AutoModelForCausalLM.from_pretrained(path)
    made = whole.generate(ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture
def lans() -> Iterator[Lans]:
    with make_lans(2) as lans:
        yield lans


def generate(host: LanHost, *options: str) -> dict[str, Any]:
    done = host.run("swarm", "generate", "demo", "-p", PROMPT, "--max-new-tokens", "12", "--json", *options)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def swarms(host: LanHost) -> dict[str, Any]:
    done = host.run("swarm", "list", "--json", "--seconds", "4")
    assert done.returncode == 0, done.stderr
    return {swarm["name"]: swarm for swarm in json.loads(done.stdout)["swarms"]}


def holes(host: LanHost, *options: str) -> list[list[int]]:
    done = host.run("swarm-node", "status", "demo", "--json", *options)
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout)["holes"]
    return found


def test_swarms_find_themselves(lans: Lans, expected: str) -> None:
    one, both, three, other = lans.host(0), lans.host(0, 1), lans.host(0), lans.host(1)
    nobody = three.run("swarm", "generate", "demo", "-p", PROMPT, "--lan")
    assert nobody.returncode == 2
    assert "no swarm was found on this network" in nobody.stderr

    # the same port everywhere: docker's address of one machine leads every other one to itself
    first = one.serve("--lan", "--blocks", "0:4", "--port", "31330")
    first.wait_ready()
    second = both.serve("--lan", "--blocks", "4:8", "--port", "31330")
    second.wait_ready()
    assert [event["joined"] for event in (*first.said("lan"), *second.said("lan"))] == [False, True]
    made = generate(three, "--lan")
    assert made["text"] == expected
    assert made["route"].count("→") == 1

    both.serve("--lan-name", "lab", "--blocks", "0:8").wait_ready()
    found = swarms(three)
    assert {name: (swarm["models"], len(swarm["nodes"])) for name, swarm in found.items()} == {
        "default": (["demo-hf"], 2),
        "lab": (["demo-hf"], 1),
    }
    addresses = {
        address.split("/")[2] for swarm in found.values() for node in swarm["nodes"] for address in node["addresses"]
    }
    assert addresses == {*one.addresses, *both.addresses}
    assert f"/{DOCKER}/" in str(first.ready)  # the network daemon listens there
    refused = three.run("swarm", "generate", "demo", "-p", PROMPT, "--lan")
    assert refused.returncode == 2
    for said in ("'default' (demo-hf; 2 nodes)", "'lab' (demo-hf; 1 node)", "--lan-name default"):
        assert said in refused.stderr
    for host in (three, other):  # the node of lab is in both networks
        made = generate(host, "--lan-name", "lab")
        assert made["text"] == expected
        assert made["route"].startswith("0:8 ")


def test_two_that_start_apart_become_one(lans: Lans, expected: str) -> None:
    one, two, three = (lans.host(0) for _ in range(3))
    two.unplug(0)
    nodes = [one.serve("--lan", "--blocks", "0:4"), two.serve("--lan", "--blocks", "4:8")]
    for node in nodes:
        node.wait_ready()
        assert [event["joined"] for event in node.said("lan")] == [False]
    assert holes(three, "--lan") == [[4, 8]]
    two.plug(0)
    deadline = time.monotonic() + 60
    while holes(three, "--lan"):
        assert time.monotonic() < deadline
    assert generate(three, "--lan")["text"] == expected


def test_a_gateway_finds_nodes_that_came_back_elsewhere(lans: Lans, expected: str) -> None:
    """None of the addresses that it joined by is left."""
    one, two = lans.host(0), lans.host(0)
    first = one.serve("--lan", "--blocks", "0:8")
    first.wait_ready()
    gateway = two.start("swarm", "gateway", "demo", "--lan")
    url = str(gateway.wait_ready()["url"]).removesuffix("/v1")
    assert generate(two, "--api", url)["text"] == expected
    first.kill()
    again = one.serve("--lan", "--blocks", "0:8")
    assert {*again.wait_ready()["maddrs"]}.isdisjoint(first.wait_ready()["maddrs"])
    assert generate(two, "--api", url)["text"] == expected
