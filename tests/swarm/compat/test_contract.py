"""Each thing that we assume of transformers beyond its public interface, by name: what a version has broken fails here.

The names of the tests are the assumptions; each says which file of ``swarm/compat`` rests on it.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel, conversion_mapping, core_model_loading
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig

from swarm.compat import attention, building, caches, generation, keywords, loading, rotary, trunk, whole
from swarm.model.family_check.table import CASES, Case

BY_LABEL = {case.label: case for case in CASES}
KINDS = [
    BY_LABEL[label]
    for label in (
        "llama-2", "llama4_text", "mixtral", "qwen3_next", "qwen3_5_text", "gemma3_text", "gemma3n_text", "gemma4-e2b",
        "deepseek_v3", "falcon-180b", "falcon-rw", "falcon_h1", "bloom", "gpt_neox", "gptj", "gpt2", "opt",
        "granitemoehybrid", "olmo_hybrid",
    )
]  # fmt: skip
"""One of each kind; tests/families has all."""
MIXERS = ("qwen3_next", "qwen3_5_text", "falcon_h1", "granitemoehybrid", "olmo_hybrid")


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def built(case: Case) -> PreTrainedModel:
    return building.build_model(case.config(), torch.float32, "eager")


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return whole.find_blocks(model)[1]


# keywords.py


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_models_take_their_cache_under_a_name_that_is_known(case: Case) -> None:
    model = built(case)
    assert keywords.cache_keyword(type(model))
    assert keywords.cache_keyword(type(model.base_model))


def test_generate_hands_on_its_cache_under_a_name_that_is_known() -> None:
    asked = parameters(GenerationMixin.prepare_inputs_for_generation)
    assert keywords.GENERATE_KEYWORD in asked
    assert {"input_ids", "next_sequence_length", "attention_mask", "inputs_embeds", "is_first_iteration"} <= asked


def test_outputs_carry_their_cache_under_a_name_that_is_known() -> None:
    model = build_tiny("llama-2")
    output = model(torch.tensor([[5, 6]]), use_cache=True)
    assert isinstance(keywords.cache_of(output), Cache)
    keywords.take_cache(output)
    assert keywords.cache_of(output) is None


# caches.py


def test_a_cache_may_have_no_layers() -> None:
    hollow = caches.HollowCache()
    assert not hollow.is_compileable  # or generate() would build masks for it
    assert not all(hollow.is_linear)  # or generate() would not leave out the columns that it holds
    assert hollow.get_seq_length() == 0
    assert hollow.get_mask_sizes(3, 0) == (3, 0)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_mixers_are_told_from_attention_by_what_they_ask_their_cache_for(case: Case) -> None:
    kinds = {type(module).__name__ for block in layers_of(built(case)) for module in block.modules()}
    found = {type(module) for block in layers_of(built(case)) for module in block.modules()}
    mixers = {kind.__name__ for kind in found if caches.is_mixer(kind)}
    assert bool(mixers) == (case.label in MIXERS), mixers
    assert not [name for name in mixers if name.endswith(("Attention", "DecoderLayer"))], kinds


@pytest.mark.parametrize("label", MIXERS)
def test_mixers_go_on_from_the_states_that_they_left(label: str) -> None:
    """And from nothing else of their cache: two steps are one."""
    model = build_tiny(label)
    for block in layers_of(model):
        for module in block.modules():
            if not caches.is_mixer(type(module)):
                continue
            name = keywords.cache_keyword(type(module))
            hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
            states, whole = caches.MixerStates(), caches.MixerStates()
            with torch.no_grad():
                expected = module(hidden, **keywords.with_cache({}, whole, name))
                parts = [module(part, **keywords.with_cache({}, states, name)) for part in hidden.split((4, 1), dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


# attention.py


def test_attention_is_found_by_the_name_in_the_config() -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def look(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        calls.append((mask, options))
        return query.transpose(1, 2), None

    attention.register_attention("swarm_contract", look)
    model = build_tiny("llama-2")
    attention.choose_attention(model.config, "swarm_contract")
    assert attention.attention_of(model.config) is look
    model(torch.tensor([[5, 6, 7]]), use_cache=False, extra=1)
    assert len(calls) == model.config.num_hidden_layers
    for mask, options in calls:
        assert mask is None, "transformers builds masks for an attention that it doesn't know"
        assert options["extra"] == 1, "keywords of the model's call no longer reach the attention function"
        assert "scaling" in options
        assert set(options) - {"extra"} <= attention.UNDERSTOOD | attention.HARMLESS


def test_the_plainest_attention_is_called_eager() -> None:
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS
    assert built(BY_LABEL["llama-2"]).config._attn_implementation == "eager"


# loading.py


def test_rules_of_conversion_have_the_parts_that_are_looked_at() -> None:
    assert "model" in parameters(conversion_mapping.get_model_conversion_mapping)
    rename = list(inspect.signature(core_model_loading.rename_source_key).parameters)
    assert rename[:5] == ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    rule = core_model_loading.WeightConverter("a", "b", operations=[core_model_loading.MergeModulelist(dim=0)])
    assert rule.source_patterns == ["a"]
    assert rule.target_patterns == ["b"]
    assert [type(one) for one in rule.operations] == [core_model_loading.MergeModulelist]
    assert core_model_loading.Concatenate(dim=1).dim == 1


@pytest.mark.parametrize("label", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_as_parts_next_to_each_other(label: str) -> None:
    rules = loading.Rules(built(BY_LABEL[label]))
    gate = "w1" if label == "mixtral" else "gate_proj"
    inner = "block_sparse_moe" if label == "mixtral" else "mlp"
    name, pattern = rules.rename(f"model.layers.1.{inner}.experts.2.{gate}.weight")
    assert name is not None
    assert pattern is not None
    assert len(rules.stacked_kinds(pattern) or ()) == 2


def test_weights_can_be_loaded_a_few_at_a_time() -> None:
    assert {"dtype", "dtype_plan", "device_map", "weight_mapping"} <= {
        field.name for field in dataclasses.fields(LoadStateDictConfig)
    }
    model = built(BY_LABEL["llama-2"])
    given = {"model.norm.weight": torch.full((64,), 3.0), "model.layers.0.mlp.up_proj.weight": torch.ones(5, 5)}
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "convert": True}
    loaded = loading.convert_into(model, given, **options)
    assert model.get_parameter("model.norm.weight").tolist() == [3.0] * 64
    assert [name for name, _, _ in loaded.mismatched] == ["model.layers.0.mlp.up_proj.weight"]
    assert "lm_head.weight" in loaded.missing
    assert "model.norm.weight" not in loaded.missing
    assert not loaded.failed


# building.py


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_models_can_be_built_without_memory_and_have_a_list_of_blocks(case: Case) -> None:
    before = torch.random.get_rng_state()
    model = built(case)
    assert torch.equal(before, torch.random.get_rng_state()), "building a model draws random numbers"
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(layers_of(model)) == 5


@pytest.mark.parametrize("label", ["llama-3.1", "gemma3_text", "falcon_h1", "gptj", "phi3"])
def test_buffers_are_computed_when_a_module_is_initialized(label: str) -> None:
    from swarm.model.families import family_of

    case = BY_LABEL[label]
    model, whole = built(case), build_tiny(label)
    family = family_of(case.model_type)
    building.fill_buffers(
        model, model, torch.device("cpu"), lambda module, name: family.buffer(module, name, model.config)
    )
    expected = dict(whole.named_buffers())
    assert expected
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_ties_are_known_by_name() -> None:
    config = BY_LABEL["llama-2"].config()
    config.tie_word_embeddings = True
    model = building.build_model(config, torch.float32, None)
    assert building.tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert {"missing_keys", "recompute_mapping"} <= parameters(model.tie_weights)


# rotary.py


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_position_embeddings_of_packed_tokens_are_those_of_their_positions(case: Case) -> None:
    base = layers_parent(build_tiny(case.label))
    module: Any = rotary.rotary_of(base)
    if module is None:
        return
    kinds = set(getattr(base.config, "layer_types", None) or ())
    hidden, packed = torch.zeros(1, 4, 64), torch.tensor([[3, 4, 0, 1]])
    flat = flatten(rotary.embed_positions(module, hidden, packed, kinds))
    row = flatten(rotary.embed_positions(module, torch.zeros(1, 5, 64), torch.arange(5)[None], kinds))
    for mine, theirs in zip(flat, row, strict=True):
        assert torch.equal(mine[:, :2], theirs[:, 3:5])
        assert torch.equal(mine[:, 2:], theirs[:, :2])
    assert rotary.varies_with_length(module) is False


def flatten(embeddings: Any) -> list[torch.Tensor]:
    if isinstance(embeddings, torch.Tensor):
        return [embeddings]
    parts = embeddings.values() if isinstance(embeddings, dict) else embeddings
    return [tensor for part in parts for tensor in flatten(part)]


# trunk.py


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_a_trunk_calls_one_layer_in_place_of_all(case: Case) -> None:
    from swarm.client.ends.ends import Echo, StackOfBlocks
    from swarm.model.families import family_of

    model = build_tiny(case.label)
    base = layers_parent(model)
    name = next(name for name in building.LAYER_LISTS if hasattr(base, name))
    setattr(base, name, nn.ModuleList())
    assert trunk.find_trunk(model) == (base, name)
    family_of(case.model_type).adapt_trunk(base)
    stack = StackOfBlocks(model.config)
    setattr(base, name, trunk.OneLayer([stack]))
    trunk.strip_trunk(model, base)
    assert trunk.takes_tuple(base, stack.give_tuple, Echo()) is not None


# whole.py


def test_experts_are_written_one_by_one() -> None:
    names = whole.saved_tensors(built(BY_LABEL["mixtral"]))
    assert "model.layers.4.block_sparse_moe.experts.3.w1.weight" in names


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_what_goes_into_the_blocks_and_comes_out_can_be_seen(case: Case) -> None:
    model, ids = build_tiny(case.label), torch.tensor([[5, 6, 7]])
    hidden, _ = whole.call_of_first_block(model, ids)
    logits, last = whole.run_whole(model, ids)
    assert hidden.shape == last.shape
    assert hidden.shape[-3:] == (1, 3, 64)
    assert logits.shape == (1, 3, 300)


# generation.py


def test_generate_asks_for_its_cache_before_the_first_step() -> None:
    asked = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert asked[:6] == [
        "self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ]  # fmt: skip
    assert generation.ASSISTED.value == "assisted_generation"


def test_streamers_are_put_to_and_ended() -> None:
    assert {"put", "end"} <= set(dir(generation.BaseStreamer))


# Helpers


def build_tiny(label: str) -> Any:
    """With weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(BY_LABEL[label].config(), attn_implementation="eager").eval()


def layers_parent(model: PreTrainedModel) -> Any:
    return whole.find_blocks(model)[0]
