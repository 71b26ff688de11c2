"""The commands as their user types them: what they print, how they end, and what they say of bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.client import SwarmModelForCausalLM
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Node, Swarm, free_port, run_command, run_swarm, run_to_end

BIN = Path(sys.executable).parent
HERE = ("--host", "127.0.0.1", "--log-format", "json")


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny_model("llama-gqa")


def copy(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def without_weights(path: Path, to: Path) -> Path:
    model = copy(path, to)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    return model


def without_a_tensor(path: Path, to: Path) -> Path:
    model = copy(path, to)
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return model


def of_unknown_type(path: Path, to: Path) -> Path:
    model = copy(path, to)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "quantum-llama"}))
    return model


BAD = {
    "no such model": (["serve", "no/such-model-here"], "no/such-model-here"),
    "blocks outside the model": (["serve", "{path}", "--blocks", "3:9"], "it has blocks 0:6"),
    "blocks that are none": (["serve", "{path}", "--blocks", "a:b"], "START:END"),
    "blocks twice": (["serve", "{path}", "--blocks", "0:2", "--num-blocks", "2"], "can't be given together"),
    "too many blocks": (["serve", "{path}", "--num-blocks", "7"], "the model has 6 blocks"),
    "an unknown dtype": (["serve", "{path}", "--dtype", "int4"], "float32, bfloat16, float16"),
    "an unknown quantization": (["serve", "{path}", "--quantization", "int3"], "none, auto, int8, nf4, int4"),
    "more KV cache than memory": (["serve", "{path}", "--cache-tokens", "999999999999"], "free memory"),
    "an unknown device": (["serve", "{path}", "--device", "tpu9"], "--device"),
    "no cuda": (["serve", "{path}", "--device", "cuda:63"], "CUDA devices"),
    "peers that are none": (["serve", "{path}", "--initial-peers", "192.168.1.5"], "/ip4/192.168.1.5/tcp"),
    "peers that do not answer": (
        [
            "serve",
            "{path}",
            "--initial-peers",
            "/ip4/127.0.0.1/tcp/9/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        ],
        "none of the initial peers answers",
    ),
    "public ip without a port": (["serve", "{path}", "--public-ip", "1.2.3.4"], "--port"),
    "adapter that is none": (["serve", "{path}", "--adapters", "{path}"], "no adapter_config.json"),
    "identity that is none": (["serve", "{path}", "--identity", "{path}/config.json"], "identity file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    path: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, says = BAD[name]
    argv = [argument.format(path=path) for argument in argv]
    code, events, stderr = run_to_end([*argv, *HERE], tmp_path)
    assert events[-1]["event"] == "error", stderr
    assert says in events[-1]["message"]
    assert "\n" not in events[-1]["message"].strip()
    assert "Traceback" not in stderr
    assert code == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_weights, "weights"),
        (without_a_tensor, "model.layers.1.mlp.up_proj.weight"),
        (of_unknown_type, "quantum-llama"),
        (lambda path, to: to.mkdir() or to, "config.json"),
    ],
)
def test_bad_checkpoints(path: Path, tmp_path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]
    model = make(path, tmp_path / "model")
    code, events, stderr = run_to_end(["serve", str(model), "--blocks", "0:3", *HERE], tmp_path)
    assert events[-1]["event"] == "error", stderr
    assert says in events[-1]["message"]
    assert "Traceback" not in stderr
    assert code == 2


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:2",)) as swarm:
        yield swarm


def test_a_port_that_is_taken(swarm: Swarm, path: Path, tmp_path: Path) -> None:
    port = swarm.initial_peers[0].split("/")[4]
    code, events, _ = run_to_end(["serve", str(path), "--port", port, *HERE], tmp_path)
    assert (code, events[-1]["event"]) == (2, "error")
    assert "choose another --port" in events[-1]["message"]


def test_a_model_of_another_shape(swarm: Swarm, path: Path, tmp_path: Path) -> None:
    from swarm.model.source import resolve

    other = tiny_model("llama-gqa", hidden=32)
    prefix = resolve(str(path)).dht_prefix
    argv = ["serve", str(other), "--dht-prefix", prefix, "--initial-peers", swarm.initial_peers[0], *HERE]
    code, events, _ = run_to_end(argv, tmp_path)
    assert (code, events[-1]["event"]) == (2, "error")
    assert "another shape" in events[-1]["message"]


def test_nodes_choose_the_blocks_that_nobody_serves(swarm: Swarm, path: Path) -> None:
    argv = ["serve", str(path), "--num-blocks", "3", "--initial-peers", swarm.initial_peers[0], *HERE]
    second = Node(argv, swarm._workdir)
    swarm.nodes.append(second)
    assert second.wait_ready()["blocks"] == [2, 5]
    everything = Node([*argv[:2], *argv[4:]], swarm._workdir)
    swarm.nodes.append(everything)
    assert everything.wait_ready()["blocks"] == [0, 6], "all of a tiny model fits in memory"


def test_a_swarm_around_a_bootstrap_peer(path: Path) -> None:
    with run_swarm(path, ()) as swarm:
        port = str(free_port())
        bootstrap = Node(["bootstrap", "--port", port, *HERE], swarm._workdir)
        swarm.nodes.append(bootstrap)
        swarm.initial_peers = bootstrap.wait_ready()["maddrs"]
        assert swarm.initial_peers == [f"/ip4/127.0.0.1/tcp/{port}/p2p/{bootstrap.peer_id}"]
        for blocks in ("0:3", "3:6"):
            swarm.add(blocks)
        with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers) as model:
            ids = torch.randint(10, 250, (1, 5))
            assert model.generate(ids, max_new_tokens=3, eos_token_id=None, pad_token_id=0).shape == (1, 8)


def test_the_command_itself_from_start_to_sigterm(path: Path, tmp_path: Path) -> None:
    port, metrics = free_port(), free_port()
    identity = tmp_path / "identity.key"
    command = [str(BIN / "swarm-node"), "serve", str(path), "--blocks", "0:6", "--name", "me", *HERE]
    command += ["--port", str(port), "--metrics-port", str(metrics), "--identity", str(identity)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(json.loads(line))
        if lines[-1]["event"] == "ready":
            break
    ready = lines[-1]
    assert ready["blocks"] == [0, 6]
    assert ready["model"] == str(path)
    assert ready["maddrs"] == [f"/ip4/127.0.0.1/tcp/{port}/p2p/{ready['peer_id']}"]

    failed = run_command(["swarm", "generate", str(path), "--initial-peers", ready["maddrs"][0], "--prompt", "x"])
    assert failed.returncode == 2
    assert "no tokenizer" in failed.stderr

    figures = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics").read().decode()
    for name in (
        "swarm_sessions 0.0",
        "swarm_cache_tokens_total 16384.0",
        "swarm_cache_bytes ",
        "swarm_queue_depth 0.0",
        "swarm_tokens_total{",
    ):
        assert name in figures

    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert time.monotonic() - begin < 10, "the issue's own limit, which supervisors rely on"
    assert [json.loads(line)["event"] for line in rest.splitlines()] == ["leaving", "stopped"]

    assert identity.stat().st_mode & 0o077 == 0


def test_ctrl_c_reaches_the_whole_terminal_and_the_node_still_says_goodbye(swarm: Swarm, path: Path) -> None:
    command = [str(BIN / "swarm-node"), "serve", str(path), "--blocks", "0:3", "--initial-peers", *HERE]
    command.insert(command.index("--initial-peers") + 1, swarm.initial_peers[0])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    peer_id = next(event["peer_id"] for event in map(json.loads, process.stdout) if event["event"] == "ready")
    status = ["swarm-node", "status", str(path), "--json", "--initial-peers", swarm.initial_peers[0]]
    assert peer_id in run_command(status).stdout
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert [json.loads(line)["event"] for line in rest.splitlines()] == ["leaving", "stopped"]
    assert process.returncode == 0
    assert peer_id not in run_command(status).stdout


def test_generate_and_status_with_the_built_in_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.model.source import resolve

    with run_swarm("demo", ("0:4", "4:8")) as swarm:
        peers = ["--initial-peers", ",".join(swarm.initial_peers)]
        command = ["swarm", "generate", "demo", *peers, "--max-new-tokens", "12"]
        made = run_command([*command, "--json"], said="Return the")
        answer = json.loads(made.stdout)
        tokenizer = AutoTokenizer.from_pretrained(resolve("demo").path)
        whole = AutoModelForCausalLM.from_pretrained(resolve("demo").path)
        ids = tokenizer("Return the", return_tensors="pt")["input_ids"]
        expected = whole.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["route"].startswith("0:4 …")
        assert " → 4:8 …" in answer["route"]

        plain = run_command([*command, "--prompt", "Return the"])
        assert plain.stdout.strip() == ("Return the" + answer["text"]).strip()
        assert "tokens/s" in plain.stderr

        long = run_command([*command, "--prompt", "x", "--max-new-tokens", "5000"])
        assert long.returncode == 2
        assert long.stderr.strip().count("\n") == 0
        assert "made for 2048" in long.stderr

        chat = ["swarm", "chat", "demo", *peers, "--max-new-tokens", "8", "--temperature", "0"]
        said = [
            "Hello \\",
            "world",
            "/route",
            f"/save {tmp_path / 'talk.json'}",
            "/reset",
            "",
            "Hello",
            "/nothing",
            "/exit",
        ]
        talk = run_command(chat, said="\n".join(said))
        assert talk.stderr.count("tokens/s") == 3, "two replies, and /route"
        assert "There is no /nothing" in talk.stderr
        saved = json.loads((tmp_path / "talk.json").read_text())
        assert [message["role"] for message in saved] == ["user", "assistant"]
        assert saved[0]["content"] == "Hello \nworld"
        assert saved[1]["content"].strip() in talk.stdout

        wide = {**os.environ, "COLUMNS": "200"}
        for program in ("swarm", "swarm-node"):
            assert "Every block is served" in run_command([program, "status", "demo", *peers, "--once"]).stdout
        top = subprocess.Popen([str(BIN / "swarm"), "top", "demo", *peers], stdout=subprocess.PIPE, text=True, env=wide)
        assert top.stdout is not None
        titles = (line for line in top.stdout if line.startswith("demo  2 nodes"))
        assert "measuring" in next(titles)
        assert "% busy" in next(titles)
        top.send_signal(signal.SIGINT)
        assert top.wait(timeout=20) == 130
        top.stdout.close()
        swarm.nodes[1].kill()


ISSUE_OPTIONS = """
    --blocks --num-blocks --initial-peers --host --port --announce --public-ip --relay --no-relay --identity --device
    --dtype --cache-tokens --max-batch-tokens --dht-prefix --name --log-format --metrics-port
"""


def test_help_names_every_option_of_the_issue() -> None:
    wide = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    text = subprocess.run([str(BIN / "swarm-node"), "serve", "--help"], capture_output=True, text=True, env=wide).stdout
    for option in ISSUE_OPTIONS.split():
        assert option in text
        assert "SWARM_" in text
