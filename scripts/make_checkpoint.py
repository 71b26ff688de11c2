#!/usr/bin/env python3
"""Make a checkpoint of a true architecture with random weights, for tests and benchmarks.

    python scripts/make_checkpoint.py OUT --like llama-gqa
    python scripts/make_checkpoint.py OUT --like llama-gqa --hidden 2048 --layers 16 --intermediate 5632 \\
        --heads 32 --kv-heads 8 --vocab 32000 --positions 4096 --dtype bfloat16 --std 0.02
    python scripts/make_checkpoint.py OUT --like llama-2-70b --layers 1 --vocab 1000 --dtype bfloat16 --std 0.02

Tensors have the names that checkpoints on the Hub have (Mixtral: one per expert) and are written shard by shard.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


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


# The published geometry of large models; blocks of theirs can be made one at a time.
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096}),
    "llama-3.1-405b": ("llama", {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
    "falcon-180b": ("falcon", {
        "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8,
        "vocab_size": 65024, "new_decoder_architecture": True, "bias": False, "hidden_dropout": 0.0}),
    "bloom-176b": ("bloom", {
        "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880, "seq_length": 2048}),
    "mixtral-8x22b": ("mixtral", {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 65536, "num_local_experts": 8,
        "num_experts_per_tok": 2}),
    "deepseek-v3": ("deepseek_v3", {"first_k_dense_replace": 3}),  # transformers' defaults are its geometry
}  # fmt: skip


def large_config(like: str, **options: Any) -> PreTrainedConfig:
    """The config of one of :data:`LARGE`, bfloat16; ``options`` are fields of it to change. ``num_hidden_layers=1`` of
    DeepSeek-V3 is a block with experts, as nearly all of its blocks are."""
    model_type, geometry = LARGE[like]
    if like == "deepseek-v3" and options.get("num_hidden_layers", 61) < 4:
        geometry = geometry | {"first_k_dense_replace": 0}
    return AutoConfig.for_model(
        model_type, **({"dtype": "bfloat16", "tie_word_embeddings": False} | geometry | options)
    )


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
    out: Path | str, config: PreTrainedConfig, *, seed: int = 0, max_shard_bytes: int = 1 << 29
) -> Path:
    """Write ``config.json`` and safetensors shards of at most ``max_shard_bytes`` (one tensor at least) to ``out``.

    Memory use is one shard. With one shard the file is ``model.safetensors``, else there is an index.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)

    shapes = _saved_tensors(model)
    shards = list(_shards(shapes, max_shard_bytes))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: _values(name, shapes[name], config.initializer_range, generator) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_bytes(tensor) for tensor in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Meta tensors by the names that a checkpoint on the Hub has; tied ones once."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tensor for name, tensor in revert_weight_conversion(model, own).items() if tensor is not None}


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


def _values(name: str, like: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    # Norm weights around one and biases around zero, none of them exactly: a part that is left out must show.
    values = torch.empty(like.shape, dtype=like.dtype).normal_(generator=generator)
    if like.dim() == 1 and name.endswith(("weight", "scale", "scalar")):
        return values.mul_(0.1).add_(4 if "embed" in name else 1)
    # What follows should hang on the token, not on what all positions share, or greedy text would be one token over and
    # over: loud embeddings, small biases.
    if "embed" in name:
        return values.mul_(10 * std)
    return values.mul_(std if like.dim() > 1 else std / 5)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--like", choices=[*PRESETS, *LARGE], default="llama-gqa")
    parser.add_argument("--hidden", type=int, help="64, or that of the large model; so for what follows")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--positions", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--std", type=float, help="scale of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 29)
    arguments = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, seed, limit = arguments.pop("out"), arguments.pop("seed"), arguments.pop("max_shard_bytes")
    if arguments["like"] in LARGE:
        names = {"layers": "num_hidden_layers", "vocab": "vocab_size", "dtype": "dtype", "std": "initializer_range"}
        if fixed := arguments.keys() - names.keys() - {"like"}:
            parser.error(f"{arguments['like']} has its own {', '.join(sorted(fixed))}")
        config = large_config(arguments.pop("like"), **{names[name]: value for name, value in arguments.items()})
    else:
        config = make_config(**arguments)
    print(make_checkpoint(out, config, seed=seed, max_shard_bytes=limit))


if __name__ == "__main__":
    main()
