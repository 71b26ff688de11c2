"""A GGUF file as MODEL: what is read equals what transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swarm.errors import ModelError
from swarm.model.load_ends import load_ends
from swarm.model.loading import load_span
from swarm.model.source import resolve
from swarm.weights import gguf_file
from swarm.weights.checkpoint import SINGLE
from tests.models import tiny_model

gguf = pytest.importorskip("gguf")


def _write(file: Path, kind: str, *, tied: bool = False, extra: dict[str, Any] | None = None) -> Path:
    """The tiny Llama as llama.cpp's converter writes one."""
    path = tiny_model("llama-gqa")
    config = AutoConfig.from_pretrained(path)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(path / SINGLE).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if tied and name == "lm_head.weight":
            continue
        of = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor.numpy(), of)
        writer.add_tensor(f"{table.get_name(name.removesuffix('.weight'))}.weight", data, raw_dtype=of)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("kind", "dtype", "tied"),
    [
        ("Q8_0", torch.bfloat16, False),
        ("Q4_0", torch.bfloat16, True),
        ("F16", torch.float16, False),
        ("F32", torch.float32, False),
    ],
)
def test_what_is_read_is_what_transformers_reads(
    tmp_path: Path, kind: str, dtype: torch.dtype, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It asks for accelerate, and makes no use of it here.
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: True)
    file = _write(tmp_path / "Tiny v1.gguf", kind, tied=tied)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=dtype)
    source = resolve(str(file))
    assert (source.dtype, source.model_type, source.num_blocks) == (dtype, "llama", 6)
    assert source.dht_prefix == "Tiny-v1-hf"
    assert source.is_local
    assert (source.quantization.title if source.quantization else kind) in (kind, f"GGUF {kind}")
    span = load_span(source, 1, 3, dtype=dtype, device="cpu")
    for ours, theirs in zip(span.blocks, whole.model.layers[1:3], strict=True):
        expected = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    ends = load_ends(source)
    assert torch.equal(ends.lm_head.weight, whole.lm_head.weight)
    assert (ends.lm_head.weight is ends.model.embed_tokens.weight) is tied


def test_the_scaling_of_llama_3(tmp_path: Path) -> None:
    """transformers leaves it out; the file has the divisors that llama.cpp's converter computes from the config."""
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, head_dim=16)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = plain / scaled
    assert divisors.min() < 1.01 < 7 < divisors.max()
    file = _write(tmp_path / "m.gguf", "Q8_0", extra={"rope_freqs.weight": divisors.numpy()})
    read = resolve(str(file)).config.rope_parameters
    assert {name: read[name] for name in config.rope_parameters} == pytest.approx(config.rope_parameters)
    other = _write(tmp_path / "n.gguf", "Q8_0", extra={"rope_freqs.weight": divisors.numpy() * 2})
    with pytest.raises(ModelError, match="rotary"):
        resolve(str(other))


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUFxxxx")
    with pytest.raises(ModelError, match=r"can't read .*broken\.gguf"):
        resolve(str(broken))
    with pytest.raises(ModelError, match="no directory"):
        resolve(str(tmp_path / "none.gguf"))
    file = _write(tmp_path / "m.gguf", "Q8_0")
    monkeypatch.setattr(gguf_file, "_ARCHITECTURES", ("qwen2",))
    with pytest.raises(ModelError, match=r"architecture 'llama'.*original weights"):
        resolve(str(file))
