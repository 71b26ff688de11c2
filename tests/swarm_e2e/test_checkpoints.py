"""Checkpoints of other kinds, in nodes: the same tokens as transformers on the weights that they stand for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from tests.models import tiny_model
from tests.swarm.weights.hub.hub_server import HubServer
from tests.swarm.weights.test_dequantize import FORMATS, quantized
from tests.swarm_e2e.nodes import run_swarm


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    packed, plain = quantized(tmp_path, tiny_model("llama-gqa"), *FORMATS["fp8"])
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(plain).generate(ids, **options)
    with (
        run_swarm(packed, ("0:4", "4:6")) as swarm,
        SwarmModelForCausalLM.from_pretrained(str(packed), initial_peers=swarm.initial_peers) as model,
    ):
        assert torch.equal(model.generate(ids, **options), expected)


def test_a_packed_checkpoint_takes_less_memory(tmp_path: Path) -> None:
    packed, plain = quantized(tmp_path, tiny_model("llama-gqa", hidden=128), *FORMATS["gptq-4-gptq_v2-True"])
    ids = torch.randint(10, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(plain).generate(ids, **options)
    sizes = []
    for arguments in ((), ("--quantization", "none")):
        with (
            run_swarm(packed, ("0:6",), *arguments) as swarm,
            SwarmModelForCausalLM.from_pretrained(str(packed), initial_peers=swarm.initial_peers) as model,
        ):
            assert torch.equal(model.generate(ids, **options), expected)
            said = {event["event"]: event for event in swarm.nodes[0].events()}
            sizes.append(float(said["blocks"]["message"].split(" × ")[1].split(" MiB")[0]))
            assert said["blocks"]["quantization"] == ("none" if arguments else "GPTQ")
            assert ("served packed (int4, group 32)" in said["checkpoint"]["message"]) == (not arguments)
            assert ("dequantized to float32" in said["checkpoint"]["message"]) == bool(arguments)
    assert sizes[0] < 0.3 * sizes[1]


def test_a_model_from_the_hub(tmp_path: Path) -> None:
    """The command, with the progress of its download in bytes."""
    sizes = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 512, "layers": 12}
    files = Path(shutil.copytree(tiny_model("llama-gqa", **sizes), tmp_path / "files"))
    with HubServer(files) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        serve = ["serve", "some/model", "--blocks", "8:10", "--log-format", "json", "--cache-tokens", "256"]
        program = "from swarm.node.cli import main; main()"
        command = [sys.executable, "-c", program, *serve]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            events = []
            try:
                for line in process.stdout:
                    events.append(json.loads(line))
                    if events[-1]["event"] in ("ready", "error"):
                        break
            finally:
                process.terminate()
        assert events[-1]["event"] == "ready", events
        progress = [event for event in events if event["event"] == "progress" and event["stage"] == "download"]
        block = sum(
            parameter.numel() * parameter.element_size()
            for parameter in AutoModelForCausalLM.from_pretrained(files).model.layers[0].parameters()
        )
        assert progress[-1]["done"] == progress[-1]["total"]
        assert 2 * block <= progress[-1]["total"] <= hub.sent() <= 2.1 * block
