"""Reading adapters: what is taken, and what is refused and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swarm.errors import ModelError, UsageError
from swarm.model.family_check.table import CASES
from swarm.model.skeleton import build_skeleton
from swarm.model.source import resolve
from swarm.node.adapters.checkpoint import CONFIG, WEIGHTS, AdapterCheckpoint, open_adapter
from swarm.node.adapters.config import AdapterSpec, parse_spec, parse_specs, read_config
from tests.adapters import make_adapter
from tests.models import make_checkpoint, tiny_model
from tests.swarm.weights.hub.hub_server import HubServer

Q = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
Tensors = dict[str, torch.Tensor]


def model() -> Path:
    return tiny_model("llama-gqa", layers=2)


def open_here(path: Path | str, base: Path | None = None, **options: Any) -> AdapterCheckpoint:
    skeleton = build_skeleton(resolve(str(base or model())), torch.float32, attention="eager")
    return open_adapter(parse_spec(str(path)), skeleton, **options)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory of its own, to be changed."""
    made = make_adapter(model(), "q-down", r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
    return Path(shutil.copytree(made, tmp_path / "ada"))


def change_config(adapter: Path, **fields: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **fields}))


def test_a_span_reads_its_own(adapter: Path) -> None:
    change_config(adapter, alpha_pattern={"0.self_attn.q_proj": 2})
    found = open_here(adapter)
    assert found.name == "ada"
    tensors = load_file(adapter / WEIGHTS)
    layers = found.load(0)
    assert set(layers) == {"self_attn.q_proj", "mlp.down_proj"}
    down, up = layers["self_attn.q_proj"]
    assert torch.equal(down, tensors[f"{Q}.lora_A.weight"])
    assert torch.equal(up, tensors[f"{Q}.lora_B.weight"] * 2 / 4)
    assert torch.equal(
        found.load(1)["mlp.down_proj"][1],
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] * (8 / 3),
    )
    assert found.block_bytes == 4 * (4 * (64 + 64) + 3 * (128 + 64))


def test_the_same_adapter_is_known_anywhere(adapter: Path) -> None:
    before = open_here(adapter).digest
    change_config(adapter, base_model_name_or_path="elsewhere", target_modules="all-linear")
    assert open_here(f"another={adapter}").digest == before
    change_config(adapter, lora_alpha=9)
    assert open_here(adapter).digest != before


def test_from_the_hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(adapter) as hub:
        hub.stand_in(monkeypatch)
        found = open_here("ada=some/model@main", cache_dir=tmp_path / "cache")
    assert found.name == "ada"
    assert (tmp_path / "cache") in found.file.parents
    assert set(found.load(1)) == {"self_attn.q_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("owner/ada", AdapterSpec("owner/ada", "owner/ada")),
        ("owner/ada@v2", AdapterSpec("owner/ada", "owner/ada", "v2")),
        ("mine=owner/ada@v2", AdapterSpec("mine", "owner/ada", "v2")),
        ("mine=/nowhere/ada", AdapterSpec("mine", "/nowhere/ada")),
    ],
)
def test_names(text: str, spec: AdapterSpec) -> None:
    assert parse_spec(text) == spec


def test_names_of_directories(tmp_path: Path) -> None:
    odd = tmp_path / "a=b@c"
    odd.mkdir()
    assert parse_spec(str(odd)) == AdapterSpec("a=b@c", str(odd))
    assert parse_spec(f"x={odd}") == AdapterSpec("x", str(odd))
    with pytest.raises(UsageError, match="two --adapters are called 'ada'"):
        parse_specs(("owner/x", "ada=owner/y", "ada=owner/z"))
    for bad in ("", "=owner/x", "a b=owner/x", "ada="):
        with pytest.raises(UsageError, match="a name of one word"):
            parse_spec(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"bias": "all"}, "trained biases"),
        ({"use_dora": True}, "has DoRA, which can't be served"),
        ({"lora_bias": True}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside LoRA"),
        ({"trainable_token_indices": [1]}, "embeddings of tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "stacked experts"),
        ({"layer_replication": [[0, 2]]}, "several times"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3"),
        ({"init_lora_weights": "pissa"}, "changes the base weights.*path_initial_model_for_weight_conversion"),
        ({"r": 0}, "makes no sense: the rank 0"),
        ({"r": "8"}, "the rank '8'"),
        ({"lora_alpha": "much"}, "makes no sense"),
        ({"lora_alpha": float("inf")}, "not finite"),
        ({"lora_alpha": 10**400}, "makes no sense"),
        ({"rank_pattern": {"(": 2}}, "makes no sense"),
        ({"rank_pattern": {"q_proj": -1}}, "the rank -1"),
        ({"r": 5}, "lora_A.weight of adapter 'ada' has shape .4, 64., but this model and rank 5 ask for .5, 64."),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "no tensors for model.layers.0.mlp.up_proj"),
    ],
)
def test_configs_that_are_refused(adapter: Path, fields: dict[str, Any], message: str) -> None:
    change_config(adapter, **fields)
    with pytest.raises(ModelError, match=message):
        open_here(adapter)


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(key)


def beside(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}.lora_A.weight"), "no lora_A for model.layers.0.self_attn.q_proj"),
        (without(f"{Q}.lora_B.weight"), "no lora_B for model.layers.0.self_attn.q_proj"),
        (beside(f"{Q}.lora_B.weight", 32, 4), "has shape .32, 4.* for .64, 4.: is it made for another model"),
        (beside(f"{Q}.lora_B.weight", 64, 4, dtype=torch.int64), "of type I64"),
        (beside(f"{Q}.lora_magnitude_vector", 64), "lora_magnitude_vector, which can't be served"),
        (beside("base_model.model.lm_head.weight", 300, 64), "lm_head.weight, which can't be served"),
        (beside("base_model.model.model.embed_tokens.lora_embedding_A", 4, 300), "lora_embedding_A"),
        (beside("base_model.model.lm_head.lora_A.weight", 4, 64), "changes lm_head, which clients compute"),
        (beside("base_model.model.model.layers.0.mlp.gate.lora_A.weight", 4, 64), "which this model hasn't"),
        (beside("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", 4, 64), "which this model hasn't"),
        (beside("base_model.model.model.layers.0.input_layernorm.lora_A.weight", 4, 64), "LlamaRMSNorm"),
        (dict.clear, "no tensors for"),
    ],
)
def test_tensors_that_are_refused(adapter: Path, change: Callable[[Tensors], None], message: str) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        open_here(adapter)


def test_files_that_are_not_there(adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="cut short"):
        open_here(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        open_here(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"never opened.*save_pretrained"):
        open_here(adapter)
    (adapter / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="can't read"):
        open_here(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(ModelError, match="no adapter_config"):
        open_here(adapter)
    with pytest.raises(ModelError, match="there is no directory"):
        open_here(f"{adapter}-elsewhere")


def test_layers_of_another_kind(tmp_path: Path) -> None:
    config = next(case for case in CASES if case.model_type == "gpt2").config()
    base = make_checkpoint(tmp_path, config)
    made = make_adapter(base, "conv", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match=r"c_attn, which is of type Conv1D here and no linear layer"):
        open_here(made, base)


@pytest.mark.parametrize("name", ["experts.0.w1", "block_sparse_moe.experts.0.w1"])
def test_experts(adapter: Path, name: str) -> None:
    """Made with a version of transformers that had each expert by itself."""
    module = f"base_model.model.model.layers.0.{name if '.e' in name else f'mlp.{name}'}"
    save_file(
        {f"{module}.lora_A.weight": torch.zeros(4, 64), f"{module}.lora_B.weight": torch.zeros(128, 4)},
        adapter / WEIGHTS,
    )
    with pytest.raises(ModelError, match=r"w1, which is a part of model.layers.0.mlp.experts.gate_up_proj here"):
        open_here(adapter, tiny_model("mixtral", layers=2))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "use_rslora"]),
        json_values,
    ).map(lambda fields: PLAIN | fields)
    | json_values
)
def test_configs_of_strangers(raw: Any) -> None:
    try:
        config = read_config(raw, "'ada'")
    except ModelError:
        return
    assert config.rank_of("model.layers.0.self_attn.q_proj") >= 1
    assert config.wants("q_proj") in (True, False)
