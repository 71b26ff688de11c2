#!/usr/bin/env python3
"""What one block of large models takes: its weights, and a token in its KV cache, ours and transformers'.

    python scripts/large_blocks.py                    # the table; needs no memory, no weights
    python scripts/large_blocks.py --run llama-2-70b  # also makes one block with random weights, runs it, compares

Both caches are measured, not computed: ours is what a block hands to the engine's attention, transformers' is what its
own DynamicCache holds after one token. The weights of a block that is run are written to a temporary folder; what needs
more than half of the free memory is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parent))
from make_checkpoint import LARGE, large_config, make_checkpoint

from swarm.node.engine.engine import Engine
from swarm.node.engine.quantization import quantized_bytes
from swarm.node.hardware import free_memory
from swarm.skeleton import build_skeleton, cache_bytes, load_span
from swarm.source import ModelSource, resolve

TOKENS = 64


def transformers_bytes(config: PreTrainedConfig) -> int:
    """Bytes that one token takes in one layer of transformers' cache."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
        cache = DynamicCache(config=model.config)
        # Experts can't be chosen without weights; the first layer's cache is filled by then
        with contextlib.suppress(RuntimeError, NotImplementedError):
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    return sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))


def block_bytes(source: ModelSource) -> int:
    """Weights of one block in bfloat16."""
    return quantized_bytes(build_skeleton(source, torch.bfloat16, attention="eager").layers[0], None)


def run(like: str) -> None:
    """One block, in our engine and as transformers' module: the same, and how fast."""
    config = large_config(like, num_hidden_layers=1, vocab_size=256, initializer_range=0.02)
    source = ModelSource(like, Path(), config, like, torch.bfloat16)
    needed, cpu = 2 * block_bytes(source), torch.device("cpu")
    if needed > free_memory(cpu) // 2:
        sys.exit(f"{like}: one block, twice, is {needed / 2**30:.1f} GiB, more than half of what is free")
    with tempfile.TemporaryDirectory() as folder:
        source = resolve(str(make_checkpoint(folder, config)))
        span = load_span(source, 0, 1, dtype=torch.bfloat16, device=cpu)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        kept: list[torch.Tensor] = []
        base = whole.get_decoder()
        block = next(module for module in base.modules() if isinstance(module, torch.nn.ModuleList))[0]
        block.register_forward_pre_hook(
            lambda _m, given, named: kept.append(given[0] if given else named["hidden_states"]), with_kwargs=True
        )
        block.register_forward_hook(lambda _m, _i, output: kept.append(output[0] if type(output) is tuple else output))
        with torch.no_grad():
            whole(torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0)), use_cache=False)
        hidden, expected = kept
        engine = Engine(span, cache_tokens=4 * TOKENS)
        engine.start()
        session = engine.open(rows=1, first=0, last=1)
        began = time.perf_counter()
        outputs = [engine.step(session, hidden[:, : TOKENS - 4], start=0).result()]
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for at in range(TOKENS - 4, TOKENS):
            outputs.append(engine.step(session, hidden[:, at : at + 1], start=at).result())
        decode = (time.perf_counter() - began) / 4
        engine.stop()
        error = (torch.cat(outputs, 1).float() - expected.float()).abs().max() / expected.float().abs().max()
        print(
            f"{like}: largest difference {error:.1e} of the largest value (bfloat16); "
            f"prefill of {TOKENS - 4} tokens {prefill * 1e3:.0f} ms, a token {decode * 1e3:.1f} ms"
        )
        if error > 0.02:
            sys.exit("that is more than rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=LARGE, nargs="+", default=[])
    print("| model | weights of a block, MiB (bfloat16) | KV bytes a token and block | transformers' |")
    print("| --- | --- | --- | --- |")
    chosen = parser.parse_args().run
    for like in LARGE:
        config = large_config(like, num_hidden_layers=1)
        source = ModelSource(like, Path(), config, like, torch.bfloat16)
        (ours,) = cache_bytes(source, torch.bfloat16, tokens=1, rows=0)
        weights = block_bytes(source) / 2**20
        print(f"| {like} | {weights:.0f} | {ours} | {transformers_bytes(config)} |", flush=True)
    for like in chosen:
        run(like)


if __name__ == "__main__":
    main()
