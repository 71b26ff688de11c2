from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarm.errors import ModelError, UsageError
from swarm.model.families import ATTENTION
from swarm.model.load_ends import load_ends
from swarm.model.loading import load_span
from swarm.model.probe import KVGeometry
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.model.span import Span
from swarm.weights.checkpoint import INDEX
from tests.models import PRESETS, make_checkpoint, make_config, tiny_model

LENGTH = 24
KV_HEADS = {"llama-mha": 4, "falcon-7b": 1, "falcon-rw": 4, "bloom": 4}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    batch: list[int],
    alibi: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One causal sequence, in the plainest way. ``batch`` takes down which blocks ran."""
    batch.append(module.layer_idx)  # type: ignore[arg-type]
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions
    logits = query @ key.transpose(2, 3) * scaling
    if alibi is not None:
        logits = logits + alibi[:, None, None] * positions
    hidden = (distance < 0) | (distance >= (sliding_window or LENGTH + 1))
    return (logits.masked_fill(hidden, float("-inf")).softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION, _attention)  # type: ignore[arg-type]


def _whole(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """transformers' own model, and what it makes of some tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    ids = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, model(ids, output_hidden_states=True)


def _run(span: Span, hidden: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    blocks: list[int] = []
    prepared = span.prepare(hidden, torch.arange(LENGTH)[None])
    outputs = []
    for block in range(span.start, span.end):
        hidden = span.run(block, hidden, prepared, blocks)
        outputs.append(hidden)
    return outputs, blocks


def _block_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.mark.parametrize("like", PRESETS)
def test_blocks_equal_the_whole_models(like: str) -> None:
    source = resolve(str(tiny_model(like)))
    _, expected = _whole(source.path)
    # The last hidden state of transformers comes after the final norm, so the last block is left out here.
    span = load_span(source, 0, 5, dtype=torch.float32, device="cpu")
    blocks: list[int] = []
    for block in range(5):
        hidden = expected.hidden_states[block]
        output = span.run(block, hidden, span.prepare(hidden, torch.arange(LENGTH)[None]), blocks)
        torch.testing.assert_close(output, expected.hidden_states[block + 1], atol=1e-5, rtol=1e-5)
    assert blocks == [0, 1, 2, 3, 4]
    assert (span.kv, span.hidden_size) == ((KVGeometry(KV_HEADS.get(like, 2), 16, 16),) * 5, 64)
    block = build_skeleton(source, torch.float32).layers[0]
    assert span.parameter_bytes == 5 * sum(4 * parameter.numel() for parameter in block.parameters())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in span.blocks.parameters())
    assert not any(module.training for module in span.blocks.modules())


@pytest.mark.parametrize("like", PRESETS)
def test_ends_and_blocks_make_the_whole_model(like: str) -> None:
    source = resolve(str(tiny_model(like)))
    whole, expected = _whole(source.path)
    ends = load_ends(source)
    assert type(ends) is type(whole)
    assert set(ends.state_dict()) == {name for name in whole.state_dict() if _block_of(name) is None}

    class Blocks(nn.Module):
        """All blocks as one, the way a client puts them in."""

        def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (_run(span, hidden)[0][-1],)

    class OneBlock(Blocks):
        def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
            return super().forward(hidden)[0]

    span = load_span(source, 0, 6, dtype=torch.float32, device="cpu")
    layers = ends.model.layers if hasattr(ends, "model") else ends.transformer.h
    assert len(layers) == 0
    layers.append(Blocks() if hasattr(ends, "transformer") else OneBlock())
    ids = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ends(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected.logits, atol=5e-5, rtol=1e-4)
    assert len(set(expected.logits[0].argmax(-1).tolist())) > 4  # tokens that vary, or tests of greedy text say little


def test_tied_ends_share_one_tensor() -> None:
    ends = load_ends(resolve(str(tiny_model("llama-gqa", tie_word_embeddings=True))))
    assert ends.lm_head.weight is ends.model.embed_tokens.weight
    bloom = load_ends(resolve(str(tiny_model("bloom", tie_word_embeddings=True))))
    assert bloom.lm_head.weight is bloom.transformer.word_embeddings.weight


def test_tied_ends_of_a_checkpoint_that_has_both(tmp_path: Path) -> None:
    """Some were saved with a head besides. As in transformers, the config decides."""
    path = Path(shutil.copytree(tiny_model("llama-gqa", tie_word_embeddings=True), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    ends = load_ends(resolve(str(path)))
    assert ends.lm_head.weight is ends.model.embed_tokens.weight
    assert torch.equal(ends.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_names_as_the_model_has_them_now(tmp_path: Path) -> None:
    """Experts that are stored fused, under transformers' own names of today, need no conversion."""
    original = tiny_model("mixtral")
    whole, expected = _whole(original)
    shutil.copy(original / "config.json", tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}, tmp_path / "model.safetensors"
    )
    span = load_span(resolve(str(tmp_path)), 0, 2, dtype=torch.float32, device="cpu")
    outputs, _ = _run(span, expected.hidden_states[0])
    torch.testing.assert_close(outputs[1], expected.hidden_states[2], atol=1e-5, rtol=1e-5)


def _mapped_from(tensor: torch.Tensor) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.split()[-1]
    raise AssertionError("not mapped at all")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_ends_are_the_mapped_file() -> None:
    source = resolve(str(tiny_model("llama-gqa", dtype="bfloat16")))
    ends = load_ends(source)
    assert ends.dtype is torch.bfloat16
    assert _mapped_from(ends.lm_head.weight).endswith("model.safetensors")
    span = load_span(source, 0, 1, dtype=torch.bfloat16, device="cpu")
    assert not _mapped_from(next(span.blocks.parameters())).endswith("model.safetensors")


@pytest.mark.parametrize("like", ["llama-gqa", "falcon-180b", "bloom", "mixtral"])
def test_bfloat16(like: str) -> None:
    source = resolve(str(tiny_model(like, dtype="bfloat16", sharded=True)))
    assert source.dtype is torch.bfloat16
    whole, expected = _whole(source.path, torch.bfloat16)
    span = load_span(source, 1, 2, dtype=torch.bfloat16, device="cpu")
    outputs, _ = _run(span, expected.hidden_states[1])
    assert outputs[0].dtype is torch.bfloat16
    torch.testing.assert_close(outputs[0], expected.hidden_states[2], atol=0.25, rtol=0.05)
    weights = whole.state_dict()
    for name, parameter in span.blocks[0].named_parameters():
        assert torch.equal(parameter, weights[next(key for key in weights if key.endswith(f".1.{name}"))])


def test_other_dtype_than_the_checkpoints() -> None:
    source = resolve(str(tiny_model("mixtral", dtype="bfloat16")))
    span = load_span(source, 2, 4, dtype=torch.float32, device="cpu")
    _, expected = _whole(source.path)
    outputs, _ = _run(span, expected.hidden_states[2])
    torch.testing.assert_close(outputs[1], expected.hidden_states[4], atol=1e-5, rtol=1e-5)
    assert {tensor.dtype for tensor in load_ends(source, dtype=torch.float32).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("like", ["llama-gqa", "falcon-180b", "bloom", "mixtral"])
def test_span_reads_only_its_own_shards(tmp_path: Path, like: str) -> None:
    path = Path(shutil.copytree(tiny_model(like, sharded=True), tmp_path / "model"))
    _, expected = _whole(path)
    files = json.loads((path / INDEX).read_text())["weight_map"]
    needed = {file for name, file in files.items() if _block_of(name) in (2, 3, 4)}
    for file in set(files.values()) - needed:
        (path / file).unlink()
    assert len(list(path.glob("*.safetensors"))) < len(set(files.values()))
    steps: list[tuple[int, int]] = []
    span = load_span(
        resolve(str(path)),
        2,
        5,
        dtype=torch.float32,
        device="cpu",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    outputs, blocks = _run(span, expected.hidden_states[2])
    assert blocks == [2, 3, 4]
    torch.testing.assert_close(outputs[-1], expected.hidden_states[5], atol=1e-5, rtol=1e-5)


def test_gradient_reaches_the_input() -> None:
    for like in ("llama-gqa", "falcon-7b", "bloom"):
        span = load_span(resolve(str(tiny_model(like))), 0, 2, dtype=torch.float32, device="cpu")
        hidden = torch.randn(1, LENGTH, 64, requires_grad=True)
        outputs, _ = _run(span, hidden)
        outputs[-1].square().sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.abs().min() > 0


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    """BLOOM's checkpoints on the Hub lack it."""
    original = tiny_model("bloom")
    shutil.copy(original / "config.json", tmp_path)
    tensors = load_file(original / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    source = resolve(str(tmp_path))
    _, expected = _whole(original)
    outputs, _ = _run(load_span(source, 0, 2, dtype=torch.float32, device="cpu"), expected.hidden_states[0])
    torch.testing.assert_close(outputs[1], expected.hidden_states[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(load_ends(source).transformer.ln_f.weight, tensors["transformer.ln_f.weight"])


def _changed(tmp_path: Path, like: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Any:
    path = Path(shutil.copytree(tiny_model(like), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return resolve(str(path))


@pytest.mark.parametrize(
    ("like", "name"),
    [
        ("llama-gqa", "model.layers.1.mlp.down_proj.weight"),
        ("bloom", "transformer.h.1.self_attention.dense.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, like: str, name: str) -> None:
    source = _changed(tmp_path, like, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"{name} is missing from .*model.safetensors"):
        load_span(source, 0, 2, dtype=torch.float32, device="cpu")
    load_span(source, 2, 3, dtype=torch.float32, device="cpu")
    load_ends(source)


def test_missing_kind_of_expert_tensor(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name and name.endswith("w3.weight")]:
            tensors.pop(name)

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj needs 4 parts"):
        load_span(_changed(tmp_path, "mixtral", change), 1, 2, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("like", "name"),
    [
        ("llama-gqa", "model.layers.1.mlp.down_proj.weight"),
        ("falcon-7b", "transformer.h.1.input_layernorm.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    ],
)
def test_wrong_shape_is_named(tmp_path: Path, like: str, name: str) -> None:
    source = _changed(tmp_path, like, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ModelError, match=f"tensor {name} .*shape.*model.safetensors|{name} in .* has shape"):
        load_span(source, 0, 2, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_end_is_named(tmp_path: Path, name: str) -> None:
    source = _changed(tmp_path, "llama-gqa", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"{name} is missing from"):
        load_ends(source)


def test_wrong_use() -> None:
    source = resolve(str(tiny_model("llama-gqa")))
    for start, end in ((-1, 2), (2, 2), (3, 7)):
        with pytest.raises(UsageError, match="0:6"):
            load_span(source, start, end, dtype=torch.float32, device="cpu")
    with pytest.raises(UsageError, match="'half'"):
        load_ends(source, dtype="half")
    span = load_span(source, 2, 3, dtype=torch.float32, device="cpu")
    hidden = torch.zeros(1, LENGTH, 64)
    with pytest.raises(IndexError, match="2:3"):
        span.run(1, hidden, span.prepare(hidden, torch.arange(LENGTH)[None]), [])


def test_source_config_is_left_alone() -> None:
    source = resolve(str(tiny_model("falcon-7b")))
    before = source.config.to_dict(), source.config._attn_implementation
    load_span(source, 0, 1, dtype=torch.bfloat16, device="cpu")
    load_ends(source, dtype=torch.bfloat16)
    assert (source.config.to_dict(), source.config._attn_implementation) == before


def test_architectures_that_cannot_be_served_say_so(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "pad_token_id": None, "dtype": "float32", "initializer_range": 0.1}
    own_attention = AutoConfig.for_model("mpt", d_model=32, n_layers=2, n_heads=2, **sizes)
    recurrent = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, **sizes)
    for number, config in enumerate((own_attention, recurrent)):
        source = resolve(str(make_checkpoint(tmp_path / str(number), config)))
        with pytest.raises(ModelError, match="can't be served"):
            load_span(source, 0, 1, dtype=torch.float32, device="cpu")


def test_generation_defaults_come_along(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, make_config("llama-gqa", layers=1))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_k": 3}))
    config = load_ends(resolve(str(path))).generation_config
    assert (config.eos_token_id, config.top_k) == ([7, 8], 3)
