#!/usr/bin/env python3
"""One block of large models at its true size: served by a real node, against transformers' own layer.

    python scripts/large_blocks.py                           # all of them, one after the other: an hour, 7 GB of disk
    python scripts/large_blocks.py llama-2-70b falcon-180b
    python scripts/large_blocks.py deepseek-v3:0 --quantization int4
    python scripts/large_blocks.py --tiny mixtral-8x22b      # the same code on a toy, to see that it runs

For each model a checkpoint of all its blocks is laid out, of which only one block is made, with random weights, and

* transformers' layer computes it, in a process of its own that ends before the node starts: 2 rows, 24 tokens of
  prefill, then 4 one by one, in bfloat16, and in float32 if there is memory for that;
* `swarm-node serve DIR --blocks i:i+1` serves it, and a client's session sends the same, the prefill in 3 steps.

Errors are in percent of the mean size of transformers' outputs. Memory is the node's, from just before it loads the
block until it is ready to compute: the kernel's own peak of what is resident, and the peak of what is the process's own
(without mapped files), looked at every 10 ms. KV bytes are what both caches hold, divided by their tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from block_reference import PROMPT, ROWS, STEPS, Reference, compute
from make_checkpoint import LARGE, SHARD_BYTES, large_config, make_checkpoint
from transformers import PreTrainedConfig

from swarm.client.session.swarm_connection import SwarmConnection
from swarm.client.settings import ClientSettings
from swarm.model.model_source import ModelSource
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.node.engine.blocks.quantization import quantized_bytes, schemes_on
from swarm.node.hosting.placement.hardware import free_memory

BLOCKS = {
    "llama-2-70b": 40, "llama-3.1-405b": 63, "falcon-180b": 40, "bloom-176b": 35, "mixtral-8x22b": 28, "deepseek-v3": 1,
}  # fmt: skip
"""One in the middle; of DeepSeek-V3 one without experts: those from 3 on, with 256 of them, are 21.4 GiB each."""

TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 300, "num_local_experts": 4,
    "n_head": 8, "num_kv_heads": 2, "moe_intermediate_size": 64, "n_routed_experts": 16, "q_lora_rank": 96,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
HEADER = (
    "| model | block | weights, MiB | peak of loading above them: resident, own | error, mean and largest | "
    "mean error against float32, transformers and ours | KV bytes a token and block: least, ours, transformers' |\n"
    + "| --- " * 7
    + "|"
)
MOST_MEAN, MOST_MORE, MOST_LARGEST, MOST_PEAK = 0.002, 1.05, 0.1, 0.15
"""What passes. A number in bfloat16 is off by 0.1 % in the mean, so 0.2 % from transformers' is rounding. Those who add
up in another order (DeepSeek's latents) may differ by more if they are as near to the result in float32: by 1.05 times
what transformers is at most. No output may be off by more than a tenth of their mean size."""


class TooSmall(Exception):
    """The machine."""


class NotServed(Exception):
    """The node ended by itself."""


@dataclass
class Node:
    """A ``swarm-node serve`` process, and what memory it took to load. Sizes are in bytes.

    Attributes:
        resident: at the peak of loading, above what it was before.
        own: the same without mapped files.
    """

    process: subprocess.Popen[str]
    metrics_port: int
    ready: dict[str, Any] | None = None
    error: str = ""
    resident: int = 0
    own: int = 0
    _loaded: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, directory: Path, block: int, quantization: str, log: Path) -> Node:
        """Starts one that serves ``block``; it is ready when :meth:`wait` returns."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", "from swarm.node.cli import main; main()", "serve", str(directory)]
        command += ["--blocks", f"{block}:{block + 1}", "--quantization", quantization, "--cache-tokens", "512"]
        command += ["--host", "127.0.0.1", "--log-format", "json", "--metrics-port", str(port)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SWARM_")}
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        node = cls(process, port)
        threading.Thread(target=node._follow, daemon=True).start()
        return node

    def wait(self, timeout: float = 900.0) -> str:
        """Waits until it serves; its address.

        Raises:
            NotServed: it did not start.
        """
        deadline = time.monotonic() + timeout
        while self.ready is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise NotServed(self.error or "the node did not start")
            time.sleep(0.1)
        address: str = self.ready["maddrs"][0]
        return address

    def token_bytes(self) -> float:
        """What a token takes in its KV cache, by its own figures."""
        lines = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics").read().decode().splitlines()
        figures = dict(line.rsplit(" ", 1) for line in lines)
        return float(figures["swarm_cache_bytes"]) / float(figures["swarm_cache_tokens_total"])

    def stop(self) -> None:
        """Ends it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                self.ready = event
            elif event["event"] == "error":
                self.error = event["message"]
            elif event.get("stage") == "load" and not event["done"]:
                Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the kernel's peak starts anew
                before = self._memory("VmRSS")
                threading.Thread(target=self._watch, args=(self._memory("RssAnon"),), daemon=True).start()
            elif event.get("stage") == "load":
                self.resident = self._memory("VmHWM") - before
                self._loaded.set()

    def _watch(self, before: int) -> None:
        while not self._loaded.wait(0.01) and self.process.poll() is None:
            self.own = max(self.own, self._memory("RssAnon") - before)

    def _memory(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(like: str, block: int, *, folder: Path, quantization: str, tiny: bool) -> str:
    """The row of the table for one block.

    Raises:
        TooSmall: the machine.
        NotServed: the node did not start.
        SystemExit: the node's outputs are not transformers', or it took too much memory.
    """
    options = {name: value for name, value in TINY.items() if hasattr(large_config(like), name)} if tiny else {}
    config = large_config(like, **options)
    _require_room(config, block, folder)
    make_checkpoint(folder, config, only=range(block, block + 1), max_shard_bytes=1 << 20 if tiny else SHARD_BYTES)
    if tiny:
        expected = compute(folder, block)
    else:
        file = folder / "reference"
        script = Path(__file__).parent / "block_reference.py"
        subprocess.run([sys.executable, str(script), str(folder), str(block), str(file)], check=True)
        expected = Reference.load(file)
    node = Node.start(folder, block, quantization, folder / "log")
    try:
        outputs = _through(node.wait(), folder, block, expected.inputs)
        ours = node.token_bytes()
    finally:
        node.stop()

    weights = expected.block_bytes
    if quantization != "none":
        weights = _block_bytes(config, block, quantization)
    resident, own = node.resident - weights, node.own - weights
    size = expected.outputs.float().abs().mean().item()
    off = (outputs.float() - expected.outputs.float()).abs() / size
    least = least_token_bytes(config)
    right = off.mean() <= MOST_MEAN
    against = "–"
    if expected.exact is not None:
        theirs, mine = (
            (each.float() - expected.exact).abs().mean().item() / size for each in (expected.outputs, outputs)
        )
        against = f"{theirs:.2%}, {mine:.2%}"
        right |= mine <= MOST_MORE * theirs
    row = (
        f"| {like} | {block} | {weights / 2**20:.0f} | {resident / weights:.1%}, {own / weights:.1%} | "
        f"{off.mean():.2%}, {off.max():.1%} | {against} | {least}, {ours:.0f}, {expected.cache_bytes} |"
    )
    if quantization == "none":
        wrong = [
            *(["its outputs are not transformers'"] if not right or off.max() > MOST_LARGEST else []),
            *(["loading took too much memory"] if resident > MOST_PEAK * weights and not tiny else []),
            *(["its KV cache is larger than need be"] if ours > least else []),
        ]
        if wrong:
            raise SystemExit(f"{row}\n{like}: {'; '.join(wrong)}")
    return row


def _through(address: str, directory: Path, block: int, inputs: torch.Tensor) -> torch.Tensor:
    """``inputs`` after the block, by a client's session with the node at ``address``."""
    settings = ClientSettings(prefill_tokens=ROWS * PROMPT // 3, wait_timeout=10.0)
    connection = SwarmConnection.open(resolve(str(directory)), [address], settings)
    try:
        with connection.session(max_length=PROMPT + STEPS, first=block, last=block + 1) as session:
            parts = inputs.split([PROMPT] + [1] * STEPS, dim=1)
            return torch.cat([session.step(part) for part in parts], dim=1)
    finally:
        connection.close()


def least_token_bytes(config: PreTrainedConfig) -> int:
    """The bytes of a token in one block's cache by the architecture: keys and values of the heads that are told apart,
    or the latent that stands for them and the rotary part of the keys, in bfloat16."""
    if (rank := getattr(config, "kv_lora_rank", None)) is not None:
        return 2 * (rank + config.qk_rope_head_dim)
    heads = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * (heads or config.num_attention_heads) * size


def _require_room(config: PreTrainedConfig, block: int, folder: Path) -> None:
    weights = _block_bytes(config, block, "none")
    memory, disk = free_memory(torch.device("cpu")), shutil.disk_usage(folder).free
    for what, needed, there in (("memory", 2 * weights + 2**30, memory), ("disk", weights + 2**28, disk)):
        if needed > there:
            raise TooSmall(f"needs {needed / 2**30:.1f} GiB of {what}, {there / 2**30:.1f} are free")


def _block_bytes(config: PreTrainedConfig, block: int, quantization: str) -> int:
    source = ModelSource("", Path(), config, "", torch.bfloat16)
    layer = build_skeleton(source, torch.bfloat16, attention="eager").layers[block]
    schemes = {scheme.name: scheme for scheme in schemes_on(torch.device("cpu"))}
    return quantized_bytes(layer, schemes.get(quantization))


def main(given: list[str] | None = None) -> None:
    """Prints a row for each model, and a line instead for one that the machine is too small for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(f"{like}:{block}" for like, block in BLOCKS.items())
    parser.add_argument("models", nargs="*", metavar="MODEL[:BLOCK]", help=f"default: {names}")
    parser.add_argument("--folder", type=Path, help="where to write the weights, which are removed; default: /tmp")
    parser.add_argument("--quantization", default="none", help="as of swarm-node; errors are then only told")
    parser.add_argument("--tiny", action="store_true", help="the same code on toys")
    arguments = parser.parse_args(given)
    chosen = []
    for each in arguments.models or BLOCKS:
        like, _, block = each.partition(":")
        if like not in LARGE or not (block or "0").isdigit():
            parser.error(f"{each}: give one of {', '.join(LARGE)}, with :BLOCK or without")
        chosen.append((like, int(block) if block else BLOCKS[like]))
    print(HEADER, flush=True)
    for like, block in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="large-block-") as folder:
            try:
                row = measure(
                    like, block, folder=Path(folder), quantization=arguments.quantization, tiny=arguments.tiny
                )
            except (TooSmall, NotServed) as error:
                row = f"{like}, block {block}: {error}"
        print(row, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
