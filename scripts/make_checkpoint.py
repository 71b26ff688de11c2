#!/usr/bin/env python3
"""Make a checkpoint of a true architecture with random weights, for tests and benchmarks.

    python scripts/make_checkpoint.py llama
    python scripts/make_checkpoint.py llama --out large --hidden 2048 --layers 16 --intermediate 5632 \\
        --heads 32 --kv-heads 8 --vocab 32000 --positions 4096 --dtype bfloat16 --std 0.02
    python scripts/make_checkpoint.py llama --layers 2 --like llama-2-70b        # two blocks of it and its ends, 5.5 GB
    python scripts/make_checkpoint.py llama --only 40:41 --like llama-3.1-405b   # one block of all 126, 6.4 GB

Tensors have the names that checkpoints on the Hub have (Mixtral: one per expert) and are written shard by shard, with
an index if there are several. Little memory is needed, whatever the size.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from swarm.compat.whole import saved_tensors
from swarm.model.family_check.random_weights import random_weight


@dataclass(frozen=True)
class Preset:
    """A family at a size that suits tests: hidden 64, 6 blocks, 300 tokens.

    None has tied embeddings (random ones that are tied follow each token by itself); ask for that with
    ``tie_word_embeddings=True``.
    """

    model_type: str
    kv_heads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "llama-mha": Preset("llama", 4),
    "llama-gqa": Preset("llama", 2),
    "falcon-180b": Preset("falcon", 2, {"new_decoder_architecture": True, "bias": False, "tie_word_embeddings": False}),
    "falcon-7b": Preset(
        "falcon", None, {"multi_query": True, "parallel_attn": True, "bias": False, "tie_word_embeddings": False}
    ),
    "falcon-rw": Preset(
        "falcon",
        None,
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
    ),
    "bloom": Preset("bloom", None, {"tie_word_embeddings": False}),
    "mixtral": Preset("mixtral", 2, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral-window": Preset("mistral", 2, {"sliding_window": 8}),
}


SHARD_BYTES = 5_000_000_000  # of most large models on the Hub
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# The published geometry of large models; blocks of theirs can be made one at a time.
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "llama-3.1-405b": ("llama", {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
    "falcon-180b": ("falcon", {
        "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8,
        "vocab_size": 65024, "new_decoder_architecture": True, "bias": False, "hidden_dropout": 0.0}),
    "bloom-176b": ("bloom", {
        "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880, "seq_length": 2048,
        "tie_word_embeddings": True}),
    "mixtral-8x22b": ("mixtral", {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 65536, "num_local_experts": 8,
        "num_experts_per_tok": 2}),
    "deepseek-v3": ("deepseek_v3", {  # what is missing here are the defaults of transformers' class
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 129280, "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}}),
}  # fmt: skip


def large_config(like: str, **options: Any) -> PreTrainedConfig:
    """The config of one of :data:`LARGE`, bfloat16; ``options`` are fields of it to change. ``num_hidden_layers=1`` of
    DeepSeek-V3 is a block with experts, as nearly all of its blocks are."""
    model_type, geometry = LARGE[like]
    if like == "deepseek-v3" and options.get("num_hidden_layers", 61) < 4:
        geometry = geometry | {"first_k_dense_replace": 0}
    values = {"dtype": "bfloat16", "tie_word_embeddings": False} | geometry | options
    # so that what comes out of a block is about as large as what goes in, however wide it is
    return AutoConfig.for_model(model_type, **{"initializer_range": values["hidden_size"] ** -0.5} | values)


def make_config(
    like: str,
    *,
    hidden: int = 64,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    vocab: int = 300,
    positions: int = 512,
    dtype: str = "float32",
    std: float = 0.15,
    **options: Any,
) -> PreTrainedConfig:
    """The config of a model like ``like``, one of :data:`PRESETS`. ``options`` go to the config as they are."""
    preset = PRESETS[like]
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "initializer_range": std,
        "dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **preset.options,
    }
    kv_heads = kv_heads or preset.kv_heads
    if preset.model_type == "falcon":
        values |= {"num_kv_heads": kv_heads or heads, "max_position_embeddings": positions, "hidden_dropout": 0.0}
        values |= {"ffn_hidden_size": intermediate} if intermediate else {}
    elif preset.model_type == "bloom":
        values |= {"seq_length": positions}
    else:
        values |= {
            "num_key_value_heads": kv_heads or heads,
            "max_position_embeddings": positions,
            "intermediate_size": intermediate or 2 * hidden,
            "tie_word_embeddings": False,
        }
    return AutoConfig.for_model(preset.model_type, **(values | options))


def make_checkpoint(
    out: Path | str,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    max_shard_bytes: int = 1 << 29,
    only: range | None = None,
) -> Path:
    """Write ``config.json`` and safetensors shards of at most ``max_shard_bytes`` (one tensor at least) to ``out``.

    With one shard the file is ``model.safetensors``, else there is an index.

    Args:
        only: the blocks to make. Nothing else is: in the shards that hold these blocks the other tensors are holes,
            which take no room on the disk and read as zeros, and the other shards are left out. The index lists all,
            so that these blocks can be loaded as if the rest were there.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)

    shapes = saved_tensors(model)
    shards = list(_shards(shapes, max_shard_bytes))
    generator = torch.Generator().manual_seed(seed)

    def values(name: str) -> Iterator[torch.Tensor]:
        return random_weight(name, shapes[name], config.initializer_range, generator)

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        made = {name for name in names if only is None or block_of(name) in only}
        if made:
            _write_shard(out / file, {name: shapes[name] for name in names}, made, values)
    if len(shards) > 1:
        total = sum(_bytes(tensor) for tensor in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to by its name in a checkpoint."""
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + _bytes(tensor) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(tensor)
    yield names


def _write_shard(
    path: Path, tensors: Mapping[str, torch.Tensor], made: set[str], values: Callable[[str], Iterator[torch.Tensor]]
) -> None:
    """A safetensors file of ``tensors``, piece by piece; those that aren't ``made`` are holes.

    The format: eight bytes with the length of the header, the header (JSON), the tensors one behind the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + _bytes(tensor)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if name in made:
                for part in values(name):
                    file.write(memoryview(part.view(torch.uint8).numpy()))
            else:
                file.seek(_bytes(tensor), 1)
        file.truncate(8 + len(text) + at)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _arguments() -> dict[str, Any]:
    """What was asked for, without what was not."""
    types = {name: preset.model_type for name, preset in PRESETS.items()} | {like: LARGE[like][0] for like in LARGE}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", metavar="MODEL_TYPE", choices=sorted(set(types.values())),
                        help=f"as in config.json: {', '.join(sorted(set(types.values())))}")  # fmt: skip
    parser.add_argument(
        "--like",
        choices=types,
        metavar="NAME",
        help="a model of this type. "
        + f"At a size for tests (hidden 64, 6 blocks, 300 tokens): {', '.join(PRESETS)}; the default is the first of "
        + f"the type. At its true size: {', '.join(LARGE)}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to write; default: the name after --like")
    parser.add_argument("--layers", type=int, help="blocks; default: as many as the model has")
    parser.add_argument(
        "--only",
        metavar="START:END",
        help="make only these blocks: in the shards that hold them the other tensors are holes, other shards are left "
        "out; swarm-node serve --blocks START:END is content with that",
    )
    for name in ("hidden", "heads", "kv-heads", "intermediate", "positions"):
        parser.add_argument(f"--{name}", type=int, help="not for models at their true size")
    parser.add_argument("--vocab", type=int, help="tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--std", type=float, help="of the weights; default: 0.15, at true size hidden size ** -0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int, help="default: 512 MiB, at true size 5 GB")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    model_type = given.pop("model_type")
    like = given.setdefault("like", next(name for name, kind in types.items() if kind == model_type))
    if types[like] != model_type:
        parser.error(f"{like} is of the type {types[like]}, not {model_type}")
    fixed = given.keys() & {"hidden", "heads", "kv_heads", "intermediate", "positions"}
    if like in LARGE and fixed:
        parser.error(f"{like} has its own {', '.join(sorted(fixed))}")
    if "only" in given:
        if not re.fullmatch(r"\d+:\d+", given["only"]):
            parser.error(f"--only {given['only']}: give the first block and the one after the last, such as 3:5")
        given["only"] = range(*map(int, given["only"].split(":")))
    return given


def main() -> None:
    given = _arguments()
    like = given.pop("like")
    out = given.pop("out", Path(like))
    writing = {name: given.pop(name) for name in ("seed", "only", "max_shard_bytes") if name in given}
    if like in LARGE:
        names = {"layers": "num_hidden_layers", "vocab": "vocab_size", "dtype": "dtype", "std": "initializer_range"}
        config = large_config(like, **{names[name]: value for name, value in given.items()})
        writing.setdefault("max_shard_bytes", SHARD_BYTES)
    else:
        config = make_config(like, **given)
    print(make_checkpoint(out, config, **writing))


if __name__ == "__main__":
    main()
